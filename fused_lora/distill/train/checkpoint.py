"""One file that a run can be taken up from: safetensors, with the rest as JSON in its header.

    param.<name>          what trains, and the buffers
    exp_avg.<name> ...    AdamW's state of it
    header                step, scaler, recipe
What processes hold in shards (FSDP2) is whole in the file, so that any number of them can go on.
Random numbers need no state: they are a function of the seed and the step. The file is written
beside its place and moved there, so that there is a whole one at any time.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.ops.operand import gathered, like

STATE = ("exp_avg", "exp_avg_sq", "step")
FORMAT = "fused_lora.distill 1"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used."""


def gather(
    module: nn.Module, optimizer: torch.optim.Optimizer, keeps: bool = True
) -> dict[str, Tensor]:
    """Everything that ``save`` writes, on the CPU; every process calls this, those with ``keeps``
    get it."""
    tensors = {f"param.{name}": value for name, value in kept(module).items()}
    for name, parameter in module.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = value
    found = {}
    for name, value in tensors.items():
        whole = gathered(value.detach())
        if keeps:
            found[name] = whole.to("cpu").contiguous()
    return found


def save(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Write ``path``, whole or not at all."""
    write(path, tensors, {"format": FORMAT, "run": json.dumps(header)})


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file that is there in whole or not at all."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    save_file(tensors, str(part), metadata)
    with part.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)


def header_of(path: Path) -> dict[str, Any]:
    """What ``save`` was given; raises CheckpointError for a file that is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}") from None
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is no checkpoint of a run: format {metadata.get('format')!r}"
        )
    return json.loads(metadata["run"])


def load(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Put everything back; raises CheckpointError, with nothing changed, where it does not fit."""
    from safetensors.torch import load_file

    tensors = load_file(str(path))
    wanted = kept(module)
    _check(path, wanted, tensors)
    with torch.no_grad():
        for name, value in wanted.items():
            value.copy_(like(tensors[f"param.{name}"], value))
    for name, parameter in module.named_parameters():
        if optimizer is not None and f"exp_avg.{name}" in tensors:
            state = {key: tensors[f"{key}.{name}"] for key in STATE}
            optimizer.state[parameter] = {
                key: value if key == "step" else like(value.to(parameter.device), parameter)
                for key, value in state.items()
            }


def kept(module: nn.Module) -> dict[str, Tensor]:
    """What training changes: the parameters that train, and the buffers."""
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    return trained | dict(module.named_buffers())


def _check(path: Path, wanted: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    inside = {name.partition(".")[2] for name in found if name.startswith("param.")}
    if odd := sorted(inside ^ set(wanted)):
        raise CheckpointError(f"{path}: in it or in the model alone: {odd[:4]} ({len(odd)} in all)")
    for name, value in wanted.items():
        shape = tuple(found[f"param.{name}"].shape)
        if shape != tuple(value.shape):
            raise CheckpointError(f"{path}: {name} is {shape}, the model's {tuple(value.shape)}")
