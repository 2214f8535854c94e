"""Every kernel that this library may choose on a device, in its configuration classes.

Of the partners of a product, in those of common widths: others are checked at their first use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from fused_lora.kernels.cuda import lora_linear as hopper
from fused_lora.kernels.cuda.chip import Chip
from fused_lora.kernels.cuda.lora_extended import TILES
from fused_lora.kernels.cuda.lora_grad_shape import Form, GradShape, examples
from fused_lora.kernels.cuda.native import why_not_on
from fused_lora.kernels.triton import tiles
from fused_lora.kernels.triton.launch import architecture
from fused_lora.kernels.triton.launches import Launch, by_rule
from fused_lora.trust.cuda_checks import ENDINGS as BEHIND
from fused_lora.trust.subjects import (
    DTYPES,
    Checked,
    of_compiled_grads,
    of_compiled_merge,
    of_compiled_product,
    of_launch,
)

LEAST_FP8 = 89  # architecture whose matrix units take e4m3
ROWS = (197, 1 << 20)  # few and many, as tiles are chosen by
ANY_FORM = (Form(6, 1, True, 1), GradShape(376, 376, 15, needs_bias=True))
RANKS = (16, 32, 64)  # every block of ranks
WIDTHS = (192, 384, 768, 1280, 4096)  # of a token, and of what lies inside its MLP
ENDINGS = ("extended_gelu", "extended_scale", "extended_dropout")
OF_HALVES = (*ENDINGS, "extended_wide")  # nothing is wider than fp32


def everything(dtypes: Sequence[str], device: torch.device) -> Iterator[Checked]:
    """What a self-test of ``device`` checks, by dtype."""
    for dtype in dtypes:
        yield from (of_launch(launch, dtype) for launch in launches(DTYPES[dtype], device))
        yield from (of_launch(launch, dtype) for launch in endings(DTYPES[dtype], device))
        if dtype != "tf32":  # these form no products, or fp32 ones whatever torch allows
            yield from (of_launch(launch, dtype) for launch in passes(DTYPES[dtype]))
            yield of_compiled_merge(dtype)
        if dtype != "float32":  # whose products no compiled kernel forms as they are
            yield from compiled_grads(dtype, device)
        if dtype in ("bfloat16", "float16"):
            yield from compiled_products(dtype, device)
            yield from (of_launch(launch, dtype) for launch in fp8(device))


def compiled_grads(dtype: str, device: torch.device) -> Iterator[Checked]:
    """The compiled gradients in every form that ``device`` has.

    Of no device, or without the compiled module: in one form that stands for all.
    """
    if why_not_on(device):
        yield of_compiled_grads(*ANY_FORM, dtype)
        return
    for form, example in examples(Chip.of(device), dtype == "tf32").items():
        yield of_compiled_grads(form, example, dtype)


def compiled_products(dtype: str, device: torch.device) -> Iterator[Checked]:
    """The compiled product in every tile, and what may stand behind it.

    In one tile that stands for all, of no device, or where the module was compiled without it.
    """
    if why_not_on(device):
        tiles = TILES[:1]
    elif Chip.of(device).arch != hopper.ARCH:
        tiles = ()
    else:
        tiles = TILES[:1] if hopper.why_not_compiled() else TILES
    yield from (of_compiled_product(tile, dtype, one) for one in BEHIND for tile in tiles)


def endings(dtype: torch.dtype, device: torch.device) -> list[Launch]:
    """Products with something before or behind them, in the tiles of common widths."""
    low = dtype.itemsize == 2
    found = [
        Launch(kernel, by_rule(kernel, m, n, WIDTHS[0], dtype, device))
        for kernel in (OF_HALVES if low else ENDINGS)
        for m in ROWS
        for n in WIDTHS
    ]
    for rank in RANKS:
        for kernel in ("shrink_dropout", *(("shrink_norm", "shrink_gelu") if low else ())):
            tall = by_rule(kernel, ROWS[1], rank, WIDTHS[0], dtype, device)
            found.append(Launch(kernel, tall))
        wide = by_rule("grad_dropout", rank, WIDTHS[0], ROWS[1], dtype, device)
        found.append(Launch("grad_dropout", wide))
    return list(dict.fromkeys(found))


def passes(dtype: torch.dtype) -> list[Launch]:
    """What passes over rows and elements, and the merge of a whole model."""
    norms = dict.fromkeys(tiles.row_tile(width) for width in WIDTHS)
    return [
        *(Launch("layer_norm", tile) for tile in norms),
        Launch("gelu", tiles.ELEMENTS),
        Launch("merge_many", tiles.MergeTile()),
    ]


def fp8(device: torch.device) -> list[Launch]:
    """What a base in FP8 takes, where ``device`` has matrix units for it, or is none."""
    if device.type == "cuda" and architecture(device) < LEAST_FP8:
        return []
    rows = dict.fromkeys(tiles.row_tile(width) for width in WIDTHS)
    products = [Launch("extended_fp8", tile) for tile in tiles.FP8]
    return [*(Launch("quantise", tile) for tile in rows), *products]


def launches(dtype: torch.dtype, device: torch.device) -> list[Launch]:
    """Every kernel of Triton in every tile of ``device``."""
    arch, size = architecture(device), dtype.itemsize
    thin = dict.fromkeys(tiles.thin_tile(m, r, size, device) for m in ROWS for r in RANKS)
    grad = dict.fromkeys(tiles.grad_tile(r, size) for r in RANKS)
    return [
        *(Launch("shrink", tile) for tile in thin),
        *(Launch("extended", tile) for tile in tiles.candidates(arch, size, bulk=True)),
        *(Launch("one_pass", tile) for tile in tiles.one_pass_candidates(arch, size)),
        *(Launch("grad", tile) for tile in grad),
        Launch("merge", tiles.MergeTile()),
    ]
