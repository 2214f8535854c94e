"""What FSDP does to a parameter, as far as anyone here must know: each process holds a part."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor, of which this process holds a part only."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def gathered(tensor: Tensor) -> Tensor:
    """The whole of ``tensor``; where it is sharded, every process must call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def like(value: Tensor, destination: Tensor) -> Tensor:
    """``value``, sharded as ``destination`` is; every process must hold all of it."""
    if not is_sharded(destination):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = destination.device_mesh, destination.placements  # type: ignore[attr-defined]
    whole = value.to(destination.device)
    return distribute_tensor(whole, mesh, placements, src_data_rank=None)  # nothing is sent


def writes(model: nn.Module) -> bool:
    """Whether this process is the one to write files: all are, unless the model is sharded."""
    if not any(is_sharded(parameter) for parameter in model.parameters()):
        return True
    return torch.distributed.get_rank() == 0
