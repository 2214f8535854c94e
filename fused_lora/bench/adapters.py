"""One naming of adapters for every contender, so that values and gradients can be compared.

A key is ``<projection>.A`` for one adapter on a projection, and ``<projection>.q.A`` for the
adapter that owns the q columns of a fused qkv projection; likewise ``B``, ``k`` and ``v``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

PROJECTIONS = ("qkv", "proj", "fc1", "fc2")
THIRDS = ("q", "k", "v")

_ADAPTER = re.compile(
    r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<letter>[AB])"
    r"(?:_(?P<role>[a-z0-9]+))?(?:\.default)?(?:\.weight)?$"
)


def projections(model: nn.Module) -> dict[str, nn.Linear]:
    """Every adapted linear by dotted name: those of ``model.blocks``, or of a bare layer set."""
    inside = "blocks." if hasattr(model, "blocks") else ""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name.startswith(inside)
        and name.rpartition(".")[2] in PROJECTIONS
    }


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter parameters of ``model`` by key, whoever put them there."""
    found = {}
    for name, parameter in model.named_parameters():
        if match := _ADAPTER.match(name):
            role = f".{match['role']}" if match["role"] else ""
            found[f"{match['module']}{role}.{match['letter']}"] = parameter
    return found


def thirds(linear: nn.Linear) -> dict[str, tuple[int, int]]:
    """The column range of q, k and v in the output of a fused qkv projection."""
    width = linear.out_features // 3
    return {third: (i * width, (i + 1) * width) for i, third in enumerate(THIRDS)}


def initial_values(model: nn.Module, rank: int, joint: bool, seed: int = 0) -> dict[str, Tensor]:
    """Seeded adapter values for ``model``, exact in bf16, with B small but not zero.

    A zero B would make every gradient of A zero, and its error meaningless.
    """
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name, linear in projections(model).items():
        split = name.endswith("qkv") and not joint
        width = linear.out_features // 3 if split else linear.out_features
        for key in [f"{name}.{third}" for third in THIRDS] if split else [name]:
            a = torch.rand(rank, linear.in_features, generator=generator) * 2 - 1  # [R, K]
            b = torch.randn(width, rank, generator=generator)  # [N, R]
            values[f"{key}.A"] = (a * linear.in_features**-0.5).bfloat16().float()
            values[f"{key}.B"] = (b * (0.02 * rank**-0.5)).bfloat16().float()
    return values


@torch.no_grad()
def copy_adapters(values: Mapping[str, Tensor], model: nn.Module) -> None:
    """Write ``values`` into the adapters of ``model``.

    Raises:
        ValueError: the two sets of keys differ.
    """
    into = adapters(model)
    if odd := sorted(values.keys() ^ into.keys()):
        raise ValueError(f"adapters on one side only: {odd[:4]} ({len(odd)} in all)")
    for key, parameter in into.items():
        parameter.copy_(values[key])


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The adapter gradients of ``model`` by key; zeros where none arrived."""
    return {
        key: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for key, parameter in adapters(model).items()
    }
