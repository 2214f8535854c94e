"""Every launch that ships, at the sizes of models, which 16 divides, and at ranks it does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_lora.kernels.interface import Adapters
from fused_lora.kernels.triton import (
    elementwise,
    lora_expand,
    lora_extended,
    lora_grad,
    lora_grad_rank,
    lora_linear_fp8,
    lora_one_pass,
    lora_shrink,
)
from fused_lora.kernels.triton import lora_merge as merging
from fused_lora.kernels.triton.border import Packed, packed, packed_together, packing
from fused_lora.kernels.triton.launch import multiprocessors
from fused_lora.kernels.triton.launches import Launch as Chosen
from fused_lora.kernels.triton.launches import extended_grads, gelu_grads
from fused_lora.kernels.triton.lora_merge import lora_merge
from fused_lora.kernels.triton.philox import dropout
from fused_lora.kernels.triton.tiles import (
    ELEMENTS,
    FP8,
    PACK,
    PACK_GRADS,
    MergeTile,
    candidates,
    expand_tile,
    extended_grads_candidates,
    gelu_grads_candidates,
    grad_tile,
    one_pass_candidates,
    pack_grads_candidates,
    row_shrink_tile,
    row_tile,
    smaller,
    thin_tile,
)
from fused_lora.reference.lora_linear_fp8 import CODES, Quantised
from fused_lora.types import Span
from fused_lora.verify.kernel_registry import LEAST_FP8

M, K, N = 512, 768, 768  # a ViT-B projection

RAGGED = " ragged"  # behind the name of a product with several ranks that 16 does not divide


class Launch(NamedTuple):
    """One kernel in one of the tiles that it may be launched in."""

    kernel: str  # as launches.py names it
    tile: object
    run: Callable[[], object]


def words(tile: object) -> str:
    """The tile as tables show it."""
    return Chosen("", tile).configuration


def group(*ranks: int, n: int = N) -> Adapters:
    """fp32 adapters over equal parts of n."""
    width = n // len(ranks)
    spans = tuple(Span(g * width, g * width + width, r) for g, r in enumerate(ranks))
    a, b = [torch.zeros(r, K) for r in ranks], [torch.zeros(width, r) for r in ranks]
    return Adapters(a, b, (1.0,) * len(ranks), spans)


def borders(x: Tensor, *ranks: int) -> list[Any]:
    """What products of x read of fp32 adapters, and of one that is in x's dtype."""
    own = group(*ranks)
    if x.dtype is torch.float32:
        return [own]
    matrices = x.new_zeros(own.rank, K), x.new_zeros(own.rank, N)
    both = Packed(*matrices, K, own.scales, own.spans)
    return [both, own.to(x.dtype)] if len(ranks) == 1 else [both]


def all_launches(x: Tensor, arch: int) -> Iterator[Launch]:
    """Every kernel, x [M, K]; those that form no product once per width of x's elements."""
    for ranks in ((16,), (64, 64, 64), (12, 12, 12)):
        yield from thin_launches(x, *ranks)
    if x.element_size() == 2:
        yield from pack_launches(x.dtype)
    yield from merge_launches(x)
    yield from row_shrink_launches(x)
    yield from expand_launches(x)
    yield from dropout_launches(x, arch)
    yield from gemm_launches(x, arch)
    yield from one_pass_launches(x, arch)
    yield from extended_grads_launches(x, arch)
    yield from gelu_grads_launches(x, arch)
    yield from pack_grads_launches(x, arch)
    for adapters in (group(64, 64, 64), group(12, 12, 12)):
        yield from fp8_launches(x, arch, adapters)
    yield from ragged_launches(x, arch)
    if torch.backends.cuda.matmul.fp32_precision == "ieee":
        yield from row_launches(x)


def pack_launches(dtype: torch.dtype) -> Iterator[Launch]:
    """Adapters in another dtype, and several in the same, of ranks that 16 divides and not; and
    those of two linears."""
    three = group(64, 64, 64)
    for adapters in (group(16), three, group(12, 12, 12), three.to(dtype)):
        yield Launch("pack", PACK, lambda adapters=adapters: packed(adapters, dtype))
    both = [three, group(16)]
    yield Launch("pack", PACK, lambda: packed_together(both, dtype))


def ragged_launches(x: Tensor, arch: int) -> Iterator[Launch]:
    """Products with groups of ranks that 16 does not divide, nor their sum, in every tile."""
    w, bias, size = x.new_zeros(N, K), x.new_zeros(N), x.element_size()
    two, three = borders(x, 5, 20), borders(x, 12, 12, 12)
    h = x.new_zeros(M, 36)
    for t, a in product(candidates(arch, size, bulk=True, ragged=True), three):
        run = lambda t=t, a=a: lora_extended.forward(x, w, bias, a, h=h, tile=t)  # noqa: E731
        yield Launch("extended" + RAGGED, t, run)
    one_pass = lora_one_pass
    for t, a in product(one_pass_candidates(arch, size, ragged=True), (*two, *three)):
        yield Launch("one_pass" + RAGGED, t, lambda t=t, a=a: one_pass.forward(x, w, bias, a, t))
        yield Launch("one_pass" + RAGGED, t, lambda t=t, a=a: one_pass.input_grad(x, w, a, t))


def fp8_launches(x: Tensor, arch: int, adapters: Adapters) -> Iterator[Launch]:
    """A base in FP8 in every tile, and what makes the codes; x in 16 bits."""
    if x.element_size() != 2 or arch < LEAST_FP8:
        return
    w, bias = Quantised(x.new_zeros(N, K, dtype=CODES), torch.ones(N)), x.new_zeros(N)
    x8, h = Quantised(w.codes[:M], w.scales[:M]), x.new_zeros(M, adapters.rank)
    yield Launch("quantise", row_tile(K), lambda: lora_linear_fp8.quantise(x))
    for t in FP8:
        run = lambda t=t: lora_linear_fp8.forward_extended_fp8(x8, w, bias, adapters, h, t)  # noqa: E731
        yield Launch("extended_fp8", t, run)


def thin_launches(x: Tensor, *ranks: int) -> Iterator[Launch]:
    """Shrink, of few rows and of many, and the gradients."""
    adapters, shrink = group(*ranks), lora_shrink
    tall, h = x.new_zeros(128 * multiprocessors(x.device), K), x.new_zeros(M, adapters.rank)
    size = x.element_size()
    name = "shrink" + RAGGED * (adapters.rank % 16 > 0)  # whose rows of h are not wide
    for rows, a in product((tall, x), borders(x, *ranks)):
        for t in and_smaller(thin_tile(rows.shape[0], adapters.rank, size, x.device)):
            yield Launch(name, t, lambda t=t, a=a, rows=rows: shrink.shrink(rows, a, tile=t))
            yield Launch(name, t, lambda t=t, a=a: shrink.shrink_grad(x, a, tile=t))
    for t in and_smaller(grad_tile(adapters.rank, size)):
        yield Launch("grad", t, lambda t=t: lora_grad_rank.a_grads(h, x, adapters, tile=t))
        yield Launch("grad", t, lambda t=t: lora_grad_rank.b_grads(h, x, adapters, tile=t))


def merge_launches(x: Tensor) -> Iterator[Launch]:
    """w' of one matrix and of many, rounded to nearest and stochastically."""
    w, noise = x.new_zeros(N, K), None if x.dtype is torch.float32 else (1, 2)
    for t, a in product(and_smaller(MergeTile()), (group(16), group(64, 64, 64))):
        for how in dict.fromkeys((None, noise)):
            run = lambda t=t, a=a, how=how: lora_merge(w, *a, noise=how, tile=t)  # noqa: E731
            yield Launch("merge", t, run)
    table = merging.pack([merging.Merge(w, w, torch.zeros(64, K), w[:, :64])])
    yield Launch("merge_many", table.tile, lambda: merging.launch_many(table, noise))


def row_shrink_launches(x: Tensor) -> Iterator[Launch]:
    """What makes x of 16 bits and forms h of it."""
    if x.element_size() != 2:
        return
    v, out = torch.zeros(K), torch.empty_like(x)
    norm, gelu_too = lora_shrink.layer_norm_shrink, lora_shrink.gelu_shrink
    for a in (group(16), group(32), group(16, 16, 16), group(64)):
        for t, z in product(and_smaller(row_shrink_tile(a.rank, norm=True)), (x, x.float())):
            run = lambda t=t, z=z, a=a: norm(z, v, v, 1e-6, a, out, tile=t)  # noqa: E731
            yield Launch("shrink_norm", t, run)
            _, pieces = packing([a, group(16)], x.dtype)
            run = lambda t=t, z=z, a=a, p=pieces: norm(z, v, v, 1e-6, a, out, None, t, p)  # noqa: E731
            yield Launch("shrink_norm", t, run)
        for t, kind in product(and_smaller(row_shrink_tile(a.rank, norm=False)), ("erf", "tanh")):
            run = lambda t=t, k=kind, a=a: gelu_too(x, k, a, out, tile=t)  # noqa: E731
            yield Launch("shrink_gelu", t, run)


def expand_launches(x: Tensor) -> Iterator[Launch]:
    """What adds low-rank terms to products of 16 bits, in a stream of the same or of fp32."""
    if x.element_size() != 2:
        return
    v, s = torch.zeros(N), torch.zeros(M)
    norm, residual = lora_expand.layer_norm_expand, lora_expand.residual_expand
    for a in (group(16), group(16, 16, 16), group(12, 12, 12), group(64)):
        h, best = x.new_zeros(M, a.rank), expand_tile(a.rank)
        for t, z in ((best, x), (best, x.float()), (smaller(best), x)):
            given = (x, z, v, s, s, h, a, z, torch.empty_like(z), t)
            yield Launch("expand_norm", t, lambda g=given: norm(*g))
            given = (x, h, a, z, v, None, t)
            yield Launch("expand_residual", t, lambda g=given: residual(*g))


def dropout_launches(x: Tensor, arch: int) -> Iterator[Launch]:
    """Every kernel that draws a mask."""
    mask, wide, h = dropout(0.1, 1, 2), borders(x, 64, 64, 64)[0], x.new_zeros(M, 192)
    size, w, none = x.element_size(), x.new_zeros(N, K), x.new_zeros(0, K)
    for t in and_smaller(thin_tile(M, 192, size, x.device, dropout=True)):
        run = lambda t=t: lora_shrink.shrink(x, wide, tile=t, dropout=mask)  # noqa: E731
        yield Launch("shrink_dropout", t, run)
    for t in and_smaller(grad_tile(192, size, dropout=True)):
        given = (h, x, group(64, 64, 64))
        run = lambda t=t, g=given: lora_grad_rank.a_grads(*g, tile=t, dropout=mask)  # noqa: E731
        yield Launch("grad_dropout", t, run)
    grad = lora_extended.input_grad
    for t in candidates(arch, size, heavy=True):
        yield Launch("extended_dropout", t, lambda t=t: grad(x, w, wide, h, t, dropout=mask))
        run = lambda t=t: grad(x[:, :0], none, wide, h, t, dropout=mask)  # noqa: E731
        yield Launch("extended_dropout", t, run)


def gemm_launches(x: Tensor, arch: int) -> Iterator[Launch]:
    """The extended GEMM in every tile: forward, dx, and each of a block's heavy endings."""
    w, bias, size = x.new_zeros(N, K), x.new_zeros(N), x.element_size()
    (one, *_), threes = borders(x, 16), borders(x, 64, 64, 64)
    h, h3 = x.new_zeros(M, 16), x.new_zeros(M, 192)
    forward, input_grad = lora_extended.forward, lora_extended.input_grad
    for t in candidates(arch, size, bulk=True):
        for three in threes:
            run = lambda t=t, a=three: forward(x, w, bias, a, h=h3, tile=t)  # noqa: E731
            yield Launch("extended", t, run)
        yield Launch("extended", t, lambda t=t: input_grad(x, w, one, dh=h, tile=t))
    for t in candidates(arch, size, heavy=True, bulk=True):
        run = lambda t=t: forward(x, w, bias, one, h=h, tile=t, factor=bias, residual=x)  # noqa: E731
        yield Launch("extended_scale", t, run)
    wide = {"factor": torch.zeros(N), "residual": torch.zeros(M, N), "out": torch.zeros(M, N)}
    for t in candidates(arch, size, heavy=True) if size == 2 else ():
        run = lambda t=t: forward(x, w, bias, one, h=h, tile=t, **wide)  # noqa: E731
        yield Launch("extended_wide", t, run)
    active = candidates(arch, size, bulk=True, activation=True)
    for t in active if size == 2 else ():
        run = lambda t=t: forward(x, w, bias, one, "erf", h, t, stores_u=False)  # noqa: E731
        yield Launch("extended_gelu", t, run)
    for t, kind in product(active, ("erf", "tanh")):
        run = lambda t=t, k=kind: forward(x, w, bias, one, k, h, t)  # noqa: E731
        yield Launch("extended_gelu", t, run)
        run = lambda t=t, k=kind: input_grad(x, w, one, h, t, activation=k, u=x)  # noqa: E731
        yield Launch("extended_gelu", t, run)


def extended_grads_launches(x: Tensor, arch: int) -> Iterator[Launch]:
    """dx through GELU's derivative with gradients, in every tile, of the least and most ranks."""
    if x.element_size() != 2:
        return
    w = x.new_zeros(N, K)
    for t, rank, kind in product(extended_grads_candidates(arch), (16, 32), ("erf", "tanh")):
        h, own = x.new_zeros(M, rank), borders(x, rank)[0]
        run = lambda t=t, a=own, h=h, k=kind: (  # noqa: E731
            lora_grad.input_grad_and_slices(x, w, a, h, k, x, h, t)
        )
        yield Launch(extended_grads(kind), t, run)


def gelu_grads_launches(x: Tensor, arch: int) -> Iterator[Launch]:
    """GELU's derivative with gradients, likewise, of adapters as they lie; and what adds dh up."""
    if x.element_size() != 2:
        return
    every = (group(16), group(32), group(32).to(x.dtype), group(12, 12))
    for t, a, kind in product(gelu_grads_candidates(K, arch), every, ("erf", "tanh")):
        h = x.new_zeros(M, a.rank)
        given = (x, a, h, kind, x, h, a, t)
        run = lambda given=given: lora_grad.activation_grad_and_slices(*given)  # noqa: E731
        yield Launch(gelu_grads(kind), t, run)
    for a, width in ((group(16), 16), (group(12, 12), 32)):
        hidden = torch.zeros(K // 256, M, width)
        run = lambda a=a, hidden=hidden: lora_grad.add_blocks(hidden, a, x.dtype)  # noqa: E731
        yield Launch("gelu_grads", gelu_grads_candidates(K, arch)[0], run)


def pack_grads_launches(x: Tensor, arch: int) -> Iterator[Launch]:
    """dy packed of three parts with gradients, in every tile: of separate adapters, of ranks that
    16 divides or not, and of a joint one; and what adds dh up."""
    if x.element_size() != 2:
        return
    n, add = 3 * N, lora_grad.add_blocks
    every = [group(*ranks, n=n) for ranks in ((16, 16, 16), (32, 32, 32), (4, 12, 5), (32,))]
    tiles = pack_grads_candidates(PACK_GRADS[0].block_n, arch)
    for t, a in product(tiles, (*every, group(16, n=n).to(x.dtype))):
        given = ((x, x, x), x.new_zeros(M, a.rank), a, t)
        run = lambda given=given: lora_grad_rank.pack_and_slices(*given)  # noqa: E731
        yield Launch("pack_grads", t, run)
    for t, a in zip(tiles, every, strict=False):
        most = max(span.rank for span in a.spans)
        hidden = torch.zeros(n // t.block_n, M, 32 if most > 16 else 16)
        run = lambda a=a, hidden=hidden: add(hidden, a, x.dtype, columns=n)  # noqa: E731
        yield Launch("pack_grads", t, run)


def one_pass_launches(x: Tensor, arch: int) -> Iterator[Launch]:
    """The one-pass GEMM in every tile: forward of three groups, and dx at the largest rank."""
    w, bias, one_pass = x.new_zeros(N, K), x.new_zeros(N), lora_one_pass
    threes, largest = borders(x, 16, 16, 16), borders(x, 64)
    for t in one_pass_candidates(arch, x.element_size()):
        for a in threes:
            yield Launch("one_pass", t, lambda t=t, a=a: one_pass.forward(x, w, bias, a, t))
        for a in largest:
            yield Launch("one_pass", t, lambda t=t, a=a: one_pass.input_grad(x, w, a, t))
    for t in one_pass_candidates(arch, x.element_size(), heavy=True):
        for a in threes:
            given = (x, w, bias, a, t)
            run = lambda g=given: one_pass.forward(*g, factor=bias, residual=x)  # noqa: E731
            yield Launch("one_pass_scale", t, run)
        for a in largest:
            given = (x, w, a, t)
            run = lambda g=given: one_pass.input_grad(*g, residual=x)  # noqa: E731
            yield Launch("one_pass_scale", t, run)
    wide = {"factor": torch.zeros(N), "residual": torch.zeros(M, N), "out": torch.zeros(M, N)}
    for t in one_pass_candidates(arch, 2, heavy=True) if x.element_size() == 2 else ():
        for a in (*threes, *largest):
            run = lambda t=t, a=a: one_pass.forward(x, w, bias, a, t, **wide)  # noqa: E731
            yield Launch("one_pass_wide", t, run)


def row_launches(x: Tensor) -> Iterator[Launch]:
    """LayerNorm and GELU, forward and backward, at the narrowest and the widest of ViT-S to L; and
    w beside borders."""
    for width in (384, 4096):
        z, v, s, t = x.new_zeros(M, width), torch.zeros(width), torch.zeros(M), row_tile(width)
        yield Launch(
            "layer_norm", t, lambda z=z, v=v: elementwise.layer_norm_forward(z, v, v, 1e-6)
        )
        yield Launch(
            "layer_norm", t, lambda z=z, v=v, s=s: elementwise.layer_norm_rebuild(z, v, v, s, s)
        )
        run = lambda z=z, v=v, s=s: elementwise.layer_norm_input_grad(z, z, v, s, s, z)  # noqa: E731
        yield Launch("layer_norm", t, run)
    yield Launch("gelu", ELEMENTS, lambda: elementwise.gelu_forward(x))
    yield Launch("gelu", ELEMENTS, lambda: elementwise.gelu_input_grad(x, x))
    w = x.new_zeros(N, K)
    for a in (group(16), group(16).to(x.dtype), group(64, 64, 64), group(12, 12, 12)):
        right = "border_weight" + RAGGED * (a.rank % 16 > 0)  # whose rows are no whole 16 bytes
        yield Launch(right, PACK, lambda a=a: merging.bordered_weight(w, a))
        yield Launch("border_weight", PACK, lambda a=a: merging.bordered_weight_rows(w, a))


def and_smaller(tile: object) -> tuple[object, ...]:
    """A tile by rule, and what stands in for it."""
    return tile, smaller(tile)
