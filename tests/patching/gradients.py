"""Adapter gradients of a model patched at block level, beside naive LoRA of the same numbers."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import fused_lora
from fused_lora.bench.methods import Naive
from fused_lora.ops.operand import RECOMPUTE
from fused_lora.testing.yardstick import Comparison, in_every_order, judge
from tests.patching.models import build, images

SIZE = {"img_size": 224, "patch_size": 16}  # 197 tokens
SHAPES = {
    "ViT-S": {"embed_dim": 384, "num_heads": 6},
    "ViT-B": {"embed_dim": 768, "num_heads": 12},
    "DINOv2-style": {"embed_dim": 384, "num_heads": 6, "init_values": 0.5, "qk_norm": True},
}


def verdicts(
    shape: str, dtype: torch.dtype, seed: int, rank: int, depth: int = 2
) -> Iterator[Comparison]:
    """Of every trained parameter in every mode; the truth is naive LoRA in float64."""
    torch.manual_seed(seed)
    base = build(**SIZE, **SHAPES[shape], depth=depth).to(dtype).train().requires_grad_(False)
    x = images(base, 1)

    def grads(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        adapters = named(model)
        generator = torch.Generator().manual_seed(seed)
        for p in adapters.values():
            value = torch.randn(p.shape, generator=generator) / p.shape[1] ** 0.5
            p.data.copy_(0.1 * value.to(base.head.weight.dtype))
        loss = model(x.to(dtype)).double().square().sum()
        return dict(zip(adapters, torch.autograd.grad(loss, list(adapters.values())), strict=True))

    def naive(dtype: torch.dtype) -> dict[str, Tensor]:
        return grads(Naive().install(copy.deepcopy(base).to(dtype), rank), dtype)

    truth, plain = naive(torch.float64), in_every_order(lambda: naive(dtype))
    for mode in RECOMPUTE:
        model = copy.deepcopy(base)
        options = {"recompute": mode, "adapter_dtype": dtype, "allow_large_rank": True}
        fused_lora.patch(model, rank=rank, level="block", **options)
        for name, found in grads(model, dtype).items():
            theirs = [run[name] for run in plain]
            yield judge(f"{mode} {name}", found, theirs, truth[name], dtype)


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    """Adapters in order of a name that both spellings share."""
    found = {n: p for n, p in model.named_parameters() if p.requires_grad}
    shared = {n.replace(".weight", "").replace(".base", ""): p for n, p in found.items()}
    return dict(sorted(shared.items()))
