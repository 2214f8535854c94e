"""Every launch that ships, at the sizes of models, which 16 divides, and at ranks it does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import torch
from torch import Tensor

from fused_lora.kernels.interface import Adapters
from fused_lora.kernels.triton import (
    gelu,
    layer_norm,
    lora_extended,
    lora_extended_fp8,
    lora_grad,
    lora_merge_many,
    lora_one_pass,
    lora_shrink,
    quantise,
)
from fused_lora.kernels.triton.dropout import dropout
from fused_lora.kernels.triton.launch import multiprocessors
from fused_lora.kernels.triton.lora_merge import lora_merge
from fused_lora.kernels.triton.tiles import FP8, candidates, one_pass_candidates
from fused_lora.reference.lora_linear_fp8 import CODES, Quantised
from fused_lora.trust.everything import LEAST_FP8
from fused_lora.types import Span

M, K, N = 512, 768, 768  # a ViT-B projection

Launch = Callable[[], object]


def group(*ranks: int) -> Adapters:
    """fp32 adapters over equal parts of N."""
    width = N // len(ranks)
    spans = tuple(Span(g * width, g * width + width, r) for g, r in enumerate(ranks))
    a, b = [torch.zeros(r, K) for r in ranks], [torch.zeros(width, r) for r in ranks]
    return Adapters(a, b, (1.0,) * len(ranks), spans)


def all_launches(x: Tensor, arch: int) -> Iterator[Launch]:
    """Every kernel, x [M, K]; those that form no product once per width of x's elements."""
    yield from thin_launches(x, group(16))
    yield from thin_launches(x, group(64, 64, 64))
    yield from merge_launches(x)
    yield from dropout_launches(x)
    yield from gemm_launches(x, arch)
    yield from one_pass_launches(x, arch)
    yield from fp8_launches(x, arch, group(64, 64, 64))
    if torch.backends.cuda.matmul.fp32_precision == "ieee":
        yield from row_launches(x)


def ragged_launches(x: Tensor, arch: int) -> Iterator[Launch]:
    """Products with groups of ranks that 16 does not divide, nor their sum, in every tile."""
    w, bias, size = x.new_zeros(N, K), x.new_zeros(N), x.element_size()
    two, three = group(5, 20), group(12, 12, 12)
    h = x.new_zeros(M, three.rank)
    yield from thin_launches(x, three)
    yield from fp8_launches(x, arch, three)
    yield lambda: lora_grad.b_grads(h, x, three)
    for tile in candidates(arch, size, bulk=True, ragged=True):
        yield lambda t=tile: lora_extended.forward(x, w, bias, three, h=h, tile=t)
    for tile in one_pass_candidates(arch, size, ragged=True):
        for adapters in (two, three):
            yield lambda t=tile, a=adapters: lora_one_pass.forward(x, w, bias, a, t)
            yield lambda t=tile, a=adapters: lora_one_pass.input_grad(x, w, a, t)


def fp8_launches(x: Tensor, arch: int, adapters: Adapters) -> Iterator[Launch]:
    """A base in FP8 in every tile, and what makes the codes; x in 16 bits."""
    if x.element_size() != 2 or arch < LEAST_FP8:
        return
    w, bias = Quantised(x.new_zeros(N, K, dtype=CODES), torch.ones(N)), x.new_zeros(N)
    x8, h = Quantised(w.codes[:M], w.scales[:M]), x.new_zeros(M, adapters.rank)
    yield lambda: quantise.quantise(x)
    for tile in FP8:
        yield lambda t=tile: lora_extended_fp8.forward(x8, w, bias, adapters, h, t)


def thin_launches(x: Tensor, adapters: Adapters) -> Iterator[Launch]:
    """Shrink, of few rows and of many, and the gradients."""
    tall, h = x.new_zeros(128 * multiprocessors(x.device), K), x.new_zeros(M, adapters.rank)
    yield lambda: lora_shrink.shrink(tall, adapters)
    yield lambda: lora_shrink.shrink(x, adapters)
    yield lambda: lora_shrink.shrink_grad(x, adapters)
    yield lambda: lora_grad.a_grads(h, x, adapters)


def merge_launches(x: Tensor) -> Iterator[Launch]:
    """w' of one matrix and of many, rounded to nearest and stochastically."""
    w, noise = x.new_zeros(N, K), None if x.dtype is torch.float32 else (1, 2)
    for adapters in (group(16), group(64, 64, 64)):
        yield lambda a=adapters: lora_merge(w, *a)
        if noise:
            yield lambda a=adapters: lora_merge(w, *a, noise=noise)
    table = lora_merge_many.pack([lora_merge_many.Merge(w, w, torch.zeros(64, K), w[:, :64])])
    yield lambda: lora_merge_many.launch(table, noise)


def dropout_launches(x: Tensor) -> Iterator[Launch]:
    """Every kernel that draws a mask."""
    mask, wide, h = dropout(0.1, 1, 2), group(64, 64, 64), x.new_zeros(M, 192)
    yield lambda: lora_shrink.shrink(x, wide, dropout=mask)
    yield lambda: lora_grad.a_grads(h, x, wide, dropout=mask)
    yield lambda: lora_extended.input_grad(x, x.new_zeros(N, K), wide, h, dropout=mask)
    none = x.new_zeros(0, K)
    yield lambda: lora_extended.input_grad(x[:, :0], none, wide, h, dropout=mask)


def gemm_launches(x: Tensor, arch: int) -> Iterator[Launch]:
    """The extended GEMM in every tile: forward, dx, and each of a block's heavy endings."""
    w, bias, size = x.new_zeros(N, K), x.new_zeros(N), x.element_size()
    one, three = group(16), group(64, 64, 64)
    h, h3 = x.new_zeros(M, 16), x.new_zeros(M, 192)
    forward, input_grad = lora_extended.forward, lora_extended.input_grad
    for tile in candidates(arch, size, bulk=True):
        yield lambda t=tile: forward(x, w, bias, three, h=h3, tile=t)
        yield lambda t=tile: input_grad(x, w, one, dh=h, tile=t)
    for tile in candidates(arch, size, heavy=True, bulk=True):
        yield lambda t=tile: forward(x, w, bias, one, h=h, tile=t, factor=bias, residual=x)
    wide = {"factor": torch.zeros(N), "residual": torch.zeros(M, N), "out": torch.zeros(M, N)}
    for tile in candidates(arch, size, heavy=True) if size == 2 else ():
        yield lambda t=tile: forward(x, w, bias, one, h=h, tile=t, **wide)
    active = candidates(arch, size, bulk=True, activation=True)
    for tile in active if size == 2 else ():
        yield lambda t=tile: forward(x, w, bias, one, "erf", h, t, stores_u=False)
    for tile, kind in product(active, ("erf", "tanh")):
        yield lambda t=tile, k=kind: forward(x, w, bias, one, k, h, t)
        yield lambda t=tile, k=kind: input_grad(x, w, one, h, t, activation=k, u=x)


def one_pass_launches(x: Tensor, arch: int) -> Iterator[Launch]:
    """The one-pass GEMM in every tile: forward of three groups, and dx at the largest rank."""
    w, bias = x.new_zeros(N, K), x.new_zeros(N)
    for tile in one_pass_candidates(arch, x.element_size()):
        yield lambda t=tile: lora_one_pass.forward(x, w, bias, group(16, 16, 16), t)
        yield lambda t=tile: lora_one_pass.input_grad(x, w, group(64), t)


def row_launches(x: Tensor) -> Iterator[Launch]:
    """LayerNorm and GELU, forward and backward, at the narrowest and the widest of ViT-S to L."""
    for width in (384, 4096):
        z, v, s = x.new_zeros(M, width), torch.zeros(width), torch.zeros(M)
        yield lambda z=z, v=v: layer_norm.forward(z, v, v, 1e-6)
        yield lambda z=z, v=v, s=s: layer_norm.rebuild(z, v, v, s, s)
        yield lambda z=z, v=v, s=s: layer_norm.input_grad(z, z, v, s, s, z)
    yield lambda: gelu.forward(x)
    yield lambda: gelu.input_grad(x, x)
