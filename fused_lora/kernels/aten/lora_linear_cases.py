"""Cases of lora_linear by the library: several linears of one x, an FP8 base, dropout by seed."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fused_lora.kernels.aten import lora_linear as aten
from fused_lora.kernels.aten.lora_linear import shrink
from fused_lora.kernels.gemm import accumulate, columns, outer, product, thin_rows
from fused_lora.kernels.interface import Adapters, Grads
from fused_lora.programs.record import opaque
from fused_lora.reference import dropout as reference
from fused_lora.reference.lora_linear_fp8 import CODES, Quantised, quantise
from fused_lora.types import Needs

# Several adapted matrices on one x, from library GEMMs: one h, one accumulation of dx.
#
#     h = x [a_1; a_2; ..]T       dh_i = s_i dy_i b_i       dx = sum_i dy_i w_i + dh [a_1; a_2; ..]
#     [da_1; da_2; ..] = dhT x    db_i = s_i dy_iT h_i      dw_i = dy_iT x
#
# The forward of each matrix, given its columns of h, is that of its own plan.


class Layer(NamedTuple):
    """One matrix in a backward pass."""

    dy: Tensor  # [M, N_i], rows contiguous
    w: Tensor | None  # [N_i, K]; None where dx is not asked for
    adapters: Adapters
    needs: Needs


def together(adapters: Sequence[Adapters]) -> Adapters:
    """All of them as one, for what reads a and the ranks; the spans stay each one's own."""
    return Adapters(
        [a for each in adapters for a in each.a],
        [b for each in adapters for b in each.b],
        [scale for each in adapters for scale in each.scales],
        [span for each in adapters for span in each.spans],
    )


def shrink_many(x: Tensor, adapters: Sequence[Adapters]) -> Tensor:
    """h [M, sum R] of x [M, K] and adapters in x's dtype."""
    return aten.shrink(x, together(adapters))


def backward_many(
    layers: Sequence[Layer],
    x: Tensor | None,  # [M, K]; None where no gradient reads it
    h: Sequence[Tensor] | None,  # [M, R_i] of each layer; None to form it of x
) -> tuple[Tensor | None, list[Grads]]:
    """dx [M, K] where it is asked for, and each layer's own gradients."""
    lows = [layer.adapters.to(layer.dy.dtype) for layer in layers]
    low, ranks = together(lows), [layer.adapters.rank for layer in layers]
    dx, da = None, [None] * len(layers)
    if any(layer.needs.x or layer.needs.a for layer in layers):
        dh = _shrink_grad([layer.dy for layer in layers], lows)
        dx = _input_grad(layers, dh, low) if layers[0].needs.x else None
    if any(layer.needs.a for layer in layers):
        assert x is not None
        widest = together([layer.adapters for layer in layers]).widest_a()
        da = product(dh.t(), x, 1.0, widest).split(ranks)  # of [sum R, K]
    if h is None and any(layer.needs.b for layer in layers):
        assert x is not None
        h = aten.shrink(x, low).split(ranks, dim=1)
    hidden = [None] * len(layers) if h is None else h
    return dx, [_own_grads(*each, x) for each in zip(layers, da, hidden, strict=True)]


def _shrink_grad(dys: Sequence[Tensor], lows: Sequence[Adapters]) -> Tensor:
    """dh [M, sum R]."""
    ranks = [low.rank for low in lows]
    dh = dys[0].new_empty(dys[0].shape[0], sum(ranks))
    for dy, low, mine in zip(dys, lows, dh.split(ranks, dim=1), strict=True):
        for g, cols, own in low.ranks():
            b = thin_rows(low.b[g], dy.shape[0])
            accumulate(columns(mine, own), columns(dy, cols), b, low.scales[g], beta=0)
    return dh


def _input_grad(layers: Sequence[Layer], dh: Tensor, low: Adapters) -> Tensor:
    """dx [M, K]: the first product starts the sum, the others add to it."""
    first, *rest = layers
    dx = first.dy @ first.w  # type: ignore[operator]
    for layer in rest:
        assert layer.w is not None
        accumulate(dx, layer.dy, layer.w, 1.0)
    if aten.stacks(dx, low):
        return accumulate(dx, dh, low.stacked_a(), 1.0)
    for g, _, ranks in low.ranks():
        accumulate(dx, columns(dh, ranks), low.a[g], 1.0)
    return dx


def _own_grads(layer: Layer, da: Tensor | None, h: Tensor | None, x: Tensor | None) -> Grads:
    dy, _, adapters, needs = layer
    a: list[Tensor | None] = [None] * len(adapters.spans)
    b: list[Tensor | None] = [None] * len(adapters.spans)
    for g, cols, ranks in adapters.ranks():
        if needs.a and da is not None:
            a[g] = da[ranks].to(adapters.a[g].dtype)
        if needs.b and h is not None:
            dtype = adapters.b[g].dtype
            b[g] = outer(columns(dy, cols), columns(h, ranks), adapters.scales[g], dtype)
    dw = dy.t() @ x if needs.w and x is not None else None
    return Grads(None, dw, dy.sum(0) if needs.bias else None, a, b)


# LoRA linear on a base in FP8, from library products.
#
#     y = s_x s_w (x8 w8T) + bias + s h bT        x8, s_x of x row by row; h = x aT of x itself
#
# ``torch._scaled_mm`` forms the base product where the device has it by rows, in bf16: y is rounded
# after it and again after the expand. Elsewhere the codes are widened, which is exact, and
# products, scales, bias and expand meet in fp32, rounded once; a CPU is not fast at it. x is
# quantised by way of an fp32 copy, freed before the product is formed.


LEAST_CAPABILITY = (9, 0)  # of the library's product by rows
MULTIPLE = 16  # that K and N must be of


def forward_fp8(
    x: Tensor,  # [M, K], rows contiguous
    w: Quantised,  # [N, K]
    bias: Tensor | None,  # [N], x's dtype
    adapters: Adapters,
) -> tuple[Tensor, Tensor]:
    """y [M, N] and h [M, sum R], in x's dtype."""
    low = adapters.to(x.dtype)
    h = shrink(x, low)
    y = _base(x, w)
    if bias is not None:
        y += bias
    wide = h.to(y.dtype)
    for g, cols, ranks in low.ranks():
        b = low.b[g].to(y.dtype).t()
        accumulate(columns(y, cols), columns(wide, ranks), b, low.scales[g])
    return y.to(x.dtype), h


def _base(x: Tensor, w: Quantised) -> Tensor:
    """x^ w^T [M, N]: in bf16 by rows of the library's, else in fp32 or wider."""
    x8 = quantise(x)
    if scales_rows(x, w.codes):
        return _by_rows(x8, w)
    y = _widened(x8.codes, w.codes, torch.promote_types(x.dtype, torch.float32))
    return y.mul_(x8.scales[:, None]).mul_(w.scales)


def _widened(x: Tensor, w: Tensor, wide: torch.dtype) -> Tensor:
    """x wT [M, N] in ``wide``: e4m3 lies in bf16 whole, and CUDA's products of it come in fp32."""
    if x.is_cuda and wide is torch.float32:
        return torch.mm(x.bfloat16(), w.bfloat16().t(), out_dtype=wide)
    return torch.mm(x.to(wide), w.to(wide).t())


def _by_rows(x: Quantised, w: Quantised) -> Tensor:
    scales = x.scales[:, None], w.scales[None, :]
    return torch._scaled_mm(x.codes, w.codes.t(), *scales, out_dtype=torch.bfloat16)


def scales_rows(x: Tensor, codes: Tensor) -> bool:
    """Whether the library has a product by rows for x [M, K] and codes [N, K]."""
    whole = codes.shape[0] % MULTIPLE == codes.shape[1] % MULTIPLE == 0
    if not (x.is_cuda and x.dtype is torch.bfloat16 and whole and x.numel() and codes.numel()):
        return False
    return torch.cuda.get_device_capability(x.device) >= LEAST_CAPABILITY and _tried(x.device)


@lru_cache(maxsize=64)
def _tried(device: torch.device) -> bool:
    """Whether the least product of all runs on ``device``; versions of torch differ."""
    one = Quantised(
        torch.zeros(MULTIPLE, MULTIPLE, device=device).to(CODES),
        torch.ones(MULTIPLE, device=device),
    )
    try:
        _by_rows(one, one)
    except (RuntimeError, ValueError):
        return False
    return True


# The dropped branch of an adapter, by the library.
#
#     h = (D x) aT      dx = D (dh a)      da = dhT (D x)      D = keep / (1 - p)
#
#                 x, dx [M, K]   a, da [R, K]   h, dh [M, R]
#
# keep is drawn anew from its seed wherever it is needed, by torch's generator of the device; by the
# counter of reference/dropout.py where another backend began with that. Its zeros and ones are
# exact in every dtype, and 1 / (1 - p) is the factor of a product.


Seed = int | Tensor  # a Tensor: an int64 on the CPU


def dropout_shrink(x: Tensor, a: Tensor, p: float, seed: Seed) -> Tensor:
    """h [M, R] in x's dtype."""
    h = x.new_empty(x.shape[0], a.shape[0])
    return accumulate(h, x * kept(x, p, seed), a.to(x.dtype).t(), inverse(p), beta=0)


def dropout_grads(
    dh: Tensor,  # [M, R]
    x: Tensor | None,  # [M, K]; None where a asks for no gradient
    a: Tensor,
    p: float,
    seed: Seed,
    needs_x: bool,
    dx: Tensor | None = None,  # [M, K], what D (dh a) is added to, in place
    counted: bool = False,  # whether keep is the counter's
) -> tuple[Tensor | None, Tensor | None]:
    """dx [M, K] in dh's dtype and da [R, K] in a's, where asked for, of one drawing."""
    if not needs_x and x is None:
        return None, None
    factor = inverse(p, counted)
    like = dh.new_empty(dh.shape[0], a.shape[1]) if x is None else x
    keep = kept(like, p, seed, counted)
    da = None if x is None else product(dh.t(), x * keep, factor, a.dtype)
    if not needs_x:
        return None, da
    through = dh @ a.to(dh.dtype)
    if dx is None:
        return through.mul_(keep).mul_(factor), da
    return dx.addcmul_(through, keep, value=factor), da


def inverse(p: float, counted: bool = False) -> float:
    """1 / (1 - p), of p in 16 bits where the counter's."""
    return 65536 / (65536 - reference.threshold(p)) if counted else 1.0 / (1.0 - p)


def kept(like: Tensor, p: float, seed: Seed, counted: bool = False) -> Tensor:
    """keep, zeros and ones in the shape and dtype of ``like``, the same for the same seed."""
    return opaque(_kept, _as, like, p, seed, counted)  # type: ignore[no-any-return]


def _kept(like: Tensor, p: float, seed: Seed, counted: bool) -> Tensor:
    if like.is_meta:
        return torch.empty_like(like)
    if counted:
        rows, columns = like.shape
        return reference.keep(rows, columns, p, int(seed), 0, like.device).to(like.dtype)
    generator = _generators.of(like.device).manual_seed(int(seed))
    return torch.empty_like(like).bernoulli_(1.0 - p, generator=generator)


class _Generators(threading.local):
    """One of each thread and device, seeded for each mask."""

    def __init__(self) -> None:
        self.made: dict[torch.device, torch.Generator] = {}

    def of(self, device: torch.device) -> torch.Generator:
        """That of ``device``."""
        if device not in self.made:
            self.made[device] = torch.Generator(device)
        return self.made[device]


_generators = _Generators()


def _as(like: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(like)
