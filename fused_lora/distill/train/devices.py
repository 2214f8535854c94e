"""Where a run computes: its processes as torchrun starts them, device, dtype, DDP and FSDP2.

Under FSDP2 each block of each model is a unit, gathered when it computes. Adapters of which a
student has parts stay whole in every process, since its blocks compute while their owner's are in
shards; their gradients are averaged here, in one message.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed, nn

from fused_lora.distill.share import shared_parameters
from fused_lora.distill.stack import stacks_of


@dataclass(frozen=True)
class World:
    """How many processes there are, and which one this is."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the processes."""
        if self.size == 1:
            return value
        total = value.clone()
        distributed.all_reduce(total)
        return total / self.size

    def agree(self, value: Any) -> Any:
        """What the first process says."""
        box = [value]
        if self.size > 1:
            distributed.broadcast_object_list(box)
        return box[0]

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            distributed.barrier()


@contextmanager
def world(device: torch.device | None = None) -> Iterator[World]:
    """This run's processes; joined here, unless the caller already did, and left at the end."""
    if distributed.is_available() and distributed.is_initialized():
        yield World(distributed.get_rank(), distributed.get_world_size(), _local_rank())
        return
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World()
        return
    on_gpu = torch.cuda.is_available() if device is None else device.type == "cuda"
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield World(distributed.get_rank(), distributed.get_world_size(), _local_rank())
    finally:
        distributed.destroy_process_group()


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """A name of ``train.precision`` on a device."""

    name: str
    device: torch.device

    @property
    def stored(self) -> torch.dtype:
        """Of parameters and images."""
        return torch.float64 if self.name == "fp64" else torch.float32

    def autocast(self) -> AbstractContextManager:
        """What forward passes run in."""
        dtype = AUTOCAST.get(self.name)
        return torch.autocast(self.device.type, dtype) if dtype else nullcontext()

    def scaler(self) -> torch.amp.GradScaler:
        """Does nothing but in fp16."""
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")


def device_of(name: str, local_rank: int = 0) -> torch.device:
    """``train.device``; raises ValueError for one that is not there."""
    if name == "auto":
        name = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"train.device = {name!r}: {error}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"train.device = {name!r}: torch sees no CUDA device")
    return device


@dataclass(frozen=True)
class Spread:
    """What to call in place of the module, and which parameters are left to ``settle``."""

    module: nn.Module
    whole: list[nn.Parameter] = field(default_factory=list)

    def unsynced(self, last: bool) -> AbstractContextManager:
        """Gradients stay at home in all micro-steps but the last."""
        if isinstance(self.module, nn.parallel.DistributedDataParallel) and not last:
            return self.module.no_sync()
        if hasattr(self.module, "set_requires_gradient_sync"):
            self.module.set_requires_gradient_sync(last)  # type: ignore[operator]
        return nullcontext()

    def settle(self) -> None:
        """After the last micro-step: the mean over the processes of what FSDP2 leaves alone."""
        if not self.whole:
            return
        for each in self.whole:
            each.grad = torch.zeros_like(each) if each.grad is None else each.grad
        grads = [each.grad for each in self.whole if each.grad is not None]
        message = torch.cat([grad.flatten() for grad in grads])
        distributed.all_reduce(message)
        message /= distributed.get_world_size()
        for grad, part in zip(grads, message.split([g.numel() for g in grads]), strict=True):
            grad.copy_(part.view_as(grad))


def spread(module: nn.Module, world: World, device: torch.device, parallel: str) -> Spread:
    """``module`` whose gradients are averaged over the processes.

    Args:
        module: on ``device``, the same in every process.
        world: one process leaves the module as it is.
        device: of this process.
        parallel: "ddp" | "fsdp2", which shards ``module`` itself.
    """
    if world.size == 1:
        return Spread(module)
    if parallel == "fsdp2":
        return Spread(module, shard(module, world, device))
    ids = [device.index] if device.type == "cuda" else None
    return Spread(nn.parallel.DistributedDataParallel(module, device_ids=ids))


def shard(module: nn.Module, world: World, device: torch.device) -> list[nn.Parameter]:
    """Shard ``module`` over the processes, block by block; back come the parameters left whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world.size,))
    whole = shared_parameters(module)
    blocks = [block for stack in stacks_of(module) for block in stack.blocks]
    for unit in (*blocks, module):
        fully_shard(unit, mesh=mesh, ignored_params=set(whole))
    return whole
