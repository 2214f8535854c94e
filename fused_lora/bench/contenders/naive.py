"""LoRA as papers write it: two small linears beside each frozen one, and an addition."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fused_lora.bench.adapters import projections, thirds
from fused_lora.bench.registry import Contender, register


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` where ``model`` has the submodule called ``name``."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


class NaiveLinear(nn.Module):
    """``y = base(x) + B(A(x))``."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        like = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.base = base
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, **like)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, **like)

    def forward(self, x: Tensor) -> Tensor:
        """The frozen output plus the low-rank one."""
        return self.base(x) + self.lora_B(self.lora_A(x))


class NaiveQKV(nn.Module):
    """Three pairs on a fused qkv, each added in place to its third of the frozen output.

    The sliced ``+=`` is what public implementations of LoRA for timm vision transformers do.
    """

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        like = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.base = base
        self.spans = thirds(base)
        for third, (start, stop) in self.spans.items():
            a = nn.Linear(base.in_features, rank, bias=False, **like)
            b = nn.Linear(rank, stop - start, bias=False, **like)
            self.add_module(f"lora_A_{third}", a)
            self.add_module(f"lora_B_{third}", b)

    def forward(self, x: Tensor) -> Tensor:
        """The frozen qkv with one low-rank output added to each third."""
        y = self.base(x)
        for third, (start, stop) in self.spans.items():
            a, b = getattr(self, f"lora_A_{third}"), getattr(self, f"lora_B_{third}")
            y[..., start:stop] += b(a(x))
        return y


@register
class Naive(Contender):
    """The reference method of the papers: q, k and v adapted separately."""

    name, title = "naive", "naive LoRA"

    def install(self, model: nn.Module, rank: int) -> nn.Module:
        """Wrap every projection, three pairs on a fused qkv unless the form is joint."""
        with torch.random.fork_rng(devices=[]):  # the values are overwritten before any use
            for name, linear in projections(model).items():
                split = name.endswith("qkv") and self.form == "separate"
                replace(model, name, (NaiveQKV if split else NaiveLinear)(linear, rank))
        return model


@register
class NaiveJoint(Naive):
    """The same with one pair on a fused qkv."""

    name, title, form = "naive_joint", "naive LoRA (joint)", "joint"
