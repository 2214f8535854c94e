"""Attentions as other libraries write them, each spelled out here in its fewest lines."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS, TOKENS = 32, 2, 9


class Bare(nn.Module):
    """Its q, k and v are one parameter, which a function reads (open_clip)."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.randn(3 * WIDTH, WIDTH) * WIDTH**-0.5)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * WIDTH))
        self.out_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens to tokens."""
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        return self.out_proj(_attend(q, k, v))


class Library(nn.Module):
    """torch's own attention, called as open_clip calls it."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens to tokens."""
        return self.inner(x, x, x, need_weights=False)[0]


class Deep(nn.Module):
    """q, k and v one module deeper than the output (transformers until 4)."""

    def __init__(self) -> None:
        super().__init__()
        names = ("query", "key", "value")
        self.attention = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in names})
        self.output = nn.ModuleDict({"dense": nn.Linear(WIDTH, WIDTH)})

    def forward(self, x: Tensor) -> Tensor:
        """Tokens to tokens."""
        return self.output["dense"](_attend(*(each(x) for each in self.attention.values())))


class PerHead(nn.Module):
    """Every head has its q, k and v side by side in y (TinyViT, LeViT)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens to tokens."""
        heads = self.qkv(x).view(*x.shape[:2], HEADS, -1).chunk(3, dim=-1)
        q, k, v = (each.transpose(1, 2) for each in heads)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TinyBlock(nn.Module):
    """Norm, attention, norm, MLP."""

    def __init__(self, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.mlp = attention, mlp

    def forward(self, x: Tensor) -> Tensor:
        """Tokens to tokens."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SwiGLU(nn.Module):
    """Gate and value packed into one linear (DINOv2's own)."""

    def __init__(self) -> None:
        super().__init__()
        self.w12, self.w3 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens to tokens."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _named_mlp() -> nn.Module:
    layers = (nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
    return nn.Sequential(OrderedDict(zip(("c_fc", "gelu", "c_proj"), layers, strict=True)))


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, batch_first=True, activation="gelu")
    return nn.TransformerEncoder(layer, 2)


def _blocks(attention: type[nn.Module]) -> nn.Module:
    return nn.Sequential(*(TinyBlock(attention(), _named_mlp()) for _ in range(2)))


MODELS = {
    "open_clip, torch's attention": lambda: _blocks(Library),
    "open_clip, bare weights": lambda: _blocks(Bare),
    "torch, encoder layers": _encoder,
    "torch, keys of another width": lambda: _blocks(_other_widths),  # type: ignore[arg-type]
    "transformers 4 names": lambda: _blocks(Deep),
    "DINOv2's own SwiGLU": lambda: nn.Sequential(
        TinyBlock(Deep(), SwiGLU()), TinyBlock(Deep(), SwiGLU())
    ),
    "heads first": lambda: _blocks(PerHead),
}


def _other_widths() -> nn.Module:
    library = Library(kdim=WIDTH, vdim=WIDTH)
    attention = library.inner
    if attention.in_proj_weight is not None:  # torch packs equal widths
        q, k, v = attention.in_proj_weight.detach().chunk(3)
        attention._qkv_same_embed_dim = False
        attention.register_parameter("in_proj_weight", None)
        for name, weight in (("q", q), ("k", k), ("v", v)):
            attention.register_parameter(f"{name}_proj_weight", nn.Parameter(weight.clone()))
    return library


def build(name: str) -> nn.Module:
    """The model called ``name``."""
    return MODELS[name]().eval()


def example(name: str) -> tuple[Tensor]:
    """Two images' tokens."""
    return (torch.randn(2, TOKENS, WIDTH),)
