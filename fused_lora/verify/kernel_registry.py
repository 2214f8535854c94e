"""Every kernel that can be asked for, with what checks it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fused_lora.kernels.cuda import lora_linear as hopper
from fused_lora.kernels.cuda.lora_extended import TILES, ProductTile
from fused_lora.kernels.cuda.lora_grad_shape import Form, GradShape, examples
from fused_lora.kernels.cuda.native import Chip, why_not_on
from fused_lora.kernels.triton import spills, tiles
from fused_lora.kernels.triton.launch import architecture
from fused_lora.kernels.triton.launches import Launch, by_rule, stand_in
from fused_lora.testing.yardstick import Comparison, in_every_order
from fused_lora.verify import launch_checks
from fused_lora.verify.check import (
    ALIGNED,
    NOISE,
    SHAPES,
    KernelId,
    Named,
    Operands,
    Shape,
    Verdict,
    check,
    compare,
    compare_exact,
    equations,
    gradients,
    of_ranks,
    of_rows,
    problems,
    stochastic,
)
from fused_lora.verify.elementwise import gradients_gelu, gradients_norm
from fused_lora.verify.launch_checks import EPILOGUES as BEHIND

DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
EXACT = (  # products and sums alone
    *("shrink", "extended", "one_pass", "grad", "merge", "merge_many", "border_weight"),
    *("extended_scale", "extended_wide", "one_pass_scale", "one_pass_wide", "expand_residual"),
    "pack_grads",
)
OF_RANKS = ("shrink_norm", "shrink_gelu", "expand_norm")  # every rank in one tile, any depth
HOLD_RANKS = (*OF_RANKS, "expand_residual")
FORM_GRADIENTS = ("extended_grads", "gelu_grads")  # in tiles of du, which are whole
GRADIENTS = {  # of x as it is given, and formed of what is given in its place
    "": (launch_checks.grads, gradients),
    "gelu": (launch_checks.grads_gelu, gradients_gelu),
    "norm": (launch_checks.grads_norm, gradients_norm),
}
TF32_BAND = 2.0**-10  # a library may form a small product in full precision where ours may round


@dataclass(frozen=True)
class Checked:
    """A subject and what it takes to check it."""

    subject: KernelId
    run: Callable[[Operands], Named]  # every result by name
    noisy: Callable[[Operands], Tensor] | None = None  # w' of stochastic rounding
    shapes: Sequence[Shape] = SHAPES  # of the problems
    equations: Callable[[Operands], Named] = equations
    exact: bool = False  # whether small integers make every result exact
    launch: Launch | None = None  # of Triton
    recipe: tuple[Any, ...] = ()  # a module, its function and arguments that make this once more

    @classmethod
    def of_recipe(cls, recipe: tuple[Any, ...]) -> Checked:
        """What has this ``recipe``; also in another process."""
        module, function, *args = recipe
        made = getattr(importlib.import_module(module), function)(*args)
        assert isinstance(made, cls), made
        return made

    def check(self, device: torch.device) -> Verdict:
        """The verdict of ``device``, found now: of the tile that serves, should this one spill."""
        found = check(self._comparisons, DTYPES[self.subject.dtype], device)
        other = self._instead(found, device)
        return found if other is None else other.check(device)

    def _instead(self, found: Verdict, device: torch.device) -> Checked | None:
        """What stands in for a launch that spilled, or found no room on the chip, in its check."""
        if self.launch is None:
            return None
        (kernel, tile), dtype = self.launch, DTYPES[self.subject.dtype]
        if found.reason.startswith("OutOfResources"):
            spills.remember(kernel, tile, spills.precision(dtype), device, spills.TOO_LARGE)
        other = stand_in(kernel, tile, dtype, device)
        return None if other == tile else of_launch(Launch(kernel, other), self.subject.dtype)

    def _comparisons(self, dtype: torch.dtype, device: torch.device) -> Iterator[Comparison | str]:
        band = TF32_BAND if self.subject.dtype == "tf32" else None
        for p in problems(dtype, device, self.shapes):
            plain = in_every_order(partial(self.equations, p.to(dtype)))
            truth = self.equations(p.to(torch.float64))
            yield from compare(partial(self.run, p), plain, truth, dtype, band)
            if self.noisy and dtype is not torch.float32:
                yield from stochastic(p, self.noisy)
        if not self.exact or dtype is torch.float32:
            return
        for p in problems(dtype, device, self.shapes, exact=True):
            yield from compare_exact(self.run(p), self.equations(p.to(torch.float64)))


def of_launch(launch: Launch, dtype: str) -> Checked:
    """A Triton kernel in one tile."""
    subject = KernelId("triton", launch.kernel, launch.configuration, dtype)
    merged = {"merge": launch_checks.triton_merged, "merge_many": launch_checks.merged_of_many}
    draws = merged.get(launch.kernel)
    noisy = None if draws is None else partial(draws, tile=launch.tile, noise=NOISE)
    shapes = of_rows(launch.width) if launch.width else ALIGNED if launch.bulk else SHAPES
    if launch.kernel.startswith(FORM_GRADIENTS):
        shapes = launch_checks.WHOLE
    elif launch.kernel == "pack_grads":
        shapes = launch_checks.packed_of(launch.tile.block_n)  # type: ignore[union-attr]
    elif launch.kernel == "border_weight":
        shapes = (SHAPES[0], launch_checks.PRODUCTS[0])  # rows of no adapter, ranks beyond a tile
    elif launch.kernel in HOLD_RANKS:
        shapes = of_ranks(launch.tile.block_r)  # type: ignore[union-attr]
    truth = partial(equations, kernel=launch.kernel)
    run, exact = partial(launch_checks.run, launch), launch.kernel in EXACT
    recipe = (__name__, "of_launch", launch, dtype)
    return Checked(subject, run, noisy, shapes, truth, exact, launch, recipe)


def of_compiled_merge(dtype: str) -> Checked:
    """The compiled kernel for weights of ``dtype``."""
    subject = KernelId("cuda", "lora_merge", "any", dtype)
    noisy = partial(launch_checks.cuda_merged, noise=NOISE)
    run, recipe = _compiled_merge, (__name__, "of_compiled_merge", dtype)
    return Checked(subject, run, noisy, exact=True, recipe=recipe)


def _compiled_merge(p: Operands) -> Named:
    return {"w'": launch_checks.cuda_merged(p)}


def of_compiled_grads(form: Form, example: GradShape, dtype: str, source: str = "") -> Checked:
    """The compiled gradients in one form, checked on ``example``; ``source`` one of GRADIENTS."""
    kernel = f"lora_grad_{source}" if source else "lora_grad"
    subject, (run, truth) = KernelId("cuda", kernel, str(form), dtype), GRADIENTS[source]
    how: dict[str, Any] = {"shapes": (launch_checks.shape_of(example),), "equations": truth}
    recipe = (__name__, "of_compiled_grads", form, example, dtype, source)
    return Checked(subject, partial(run, example=example), **how, exact=not source, recipe=recipe)


def of_compiled_product(tile: ProductTile, dtype: str, behind: str = "") -> Checked:
    """The compiled product in one tile; ``behind`` it gelu, scale or nothing."""
    kernel = f"lora_linear_{behind}" if behind else "lora_linear"
    subject = KernelId("cuda", kernel, str(tile), dtype)
    run = partial(launch_checks.run_product, behind=behind, tile=tile)
    truth = partial(equations, kernel=f"extended_{behind}")
    exact = behind != "gelu"
    recipe = (__name__, "of_compiled_product", tile, dtype, behind)
    shapes = launch_checks.PRODUCTS
    return Checked(subject, run, shapes=shapes, equations=truth, exact=exact, recipe=recipe)


# Every kernel that this library may choose on a device, in its configuration classes.
#
# Of the partners of a product, in those of common widths: others are checked at their first use.


LEAST_FP8 = 89  # architecture whose matrix units take e4m3
ROWS = (197, 1 << 20)  # few and many, as tiles are chosen by
ANY_FORM = (Form(6, 1, True, 1), GradShape(376, 376, 15, needs_bias=True))
RANKS = (16, 32, 64)  # every block of ranks
WIDTHS = (192, 384, 768, 1280, 4096)  # of a token, and of what lies inside its MLP
EPILOGUES = ("extended_gelu", "extended_scale", "one_pass_scale", "extended_dropout")
OF_HALVES = (*EPILOGUES, "extended_wide", "one_pass_wide")  # nothing is wider than fp32


def every_kernel(dtypes: Sequence[str], device: torch.device) -> Iterator[Checked]:
    """What a self-test of ``device`` checks, by dtype."""
    for dtype in dtypes:
        yield from (of_launch(launch, dtype) for launch in launches(DTYPES[dtype], device))
        yield from (of_launch(launch, dtype) for launch in epilogues(DTYPES[dtype], device))
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
    known = {} if why_not_on(device) else examples(Chip.of(device), dtype == "tf32")
    for form, example in known.items() or [ANY_FORM]:
        yield of_compiled_grads(form, example, dtype)
        if dtype != "tf32":
            yield of_compiled_grads(form, example, dtype, "gelu")
            yield of_compiled_grads(form, example, dtype, "norm")


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


def epilogues(dtype: torch.dtype, device: torch.device) -> list[Launch]:
    """Products with something before or behind them, in the tiles of common widths."""
    low = dtype.itemsize == 2
    found = [
        Launch(kernel, by_rule(kernel, m, n, WIDTHS[0], dtype, device))
        for kernel in (OF_HALVES if low else EPILOGUES)
        for m in ROWS
        for n in WIDTHS
    ]
    if low:
        arch = architecture(device)
        every: dict[str, tuple[Any, ...]] = {
            "extended_grads": tiles.extended_grads_candidates(arch),
            "gelu_grads": tiles.gelu_grads_candidates(launch_checks.WHOLE[0].k, arch),
        }
        for kernel, own in every.items():
            found += [Launch(f"{kernel}{kind}", tile) for kind in ("", "_tanh") for tile in own]
        every_part = tiles.pack_grads_candidates(tiles.PACK_GRADS[0].block_n, arch)
        found += [Launch("pack_grads", tile) for tile in every_part]
    for rank in RANKS:
        for kernel in ("shrink_dropout", *(OF_RANKS if low else ())):
            tall = by_rule(kernel, ROWS[1], rank, WIDTHS[0], dtype, device)
            found.append(Launch(kernel, tall))
        if low:
            tall = by_rule("expand_residual", ROWS[1], WIDTHS[0], rank, dtype, device)
            found.append(Launch("expand_residual", tall))
        wide = by_rule("grad_dropout", rank, WIDTHS[0], ROWS[1], dtype, device)
        found.append(Launch("grad_dropout", wide))
    return list(dict.fromkeys(found))


def passes(dtype: torch.dtype) -> list[Launch]:
    """What passes over rows and elements, and the merge of a whole model."""
    norms = dict.fromkeys(tiles.row_tile(width) for width in WIDTHS)
    return [
        *(Launch("layer_norm", tile) for tile in norms),
        Launch("gelu", tiles.ELEMENTS),
        Launch("border_weight", tiles.PACK),
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
