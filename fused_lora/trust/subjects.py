"""Everything that is checked, each with what it takes to check it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fused_lora.kernels.cuda.lora_extended import Tile
from fused_lora.kernels.cuda.lora_grad_shape import Form, GradShape
from fused_lora.kernels.triton import spills
from fused_lora.kernels.triton.launches import Launch, stand_in
from fused_lora.testing.yardstick import Comparison, in_every_order
from fused_lora.trust import cuda_checks, triton_checks, triton_partners
from fused_lora.trust.check import check, compare, compare_exact
from fused_lora.trust.equations import Named, equations, gradients
from fused_lora.trust.problems import ALIGNED, SHAPES, Operands, Shape, of_rows, problems
from fused_lora.trust.rounding import NOISE, stochastic
from fused_lora.trust.verdict import Subject, Verdict

DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
EXACT = (  # products and sums alone
    *("shrink", "extended", "one_pass", "grad", "merge", "merge_many"),
    *("extended_scale", "extended_wide"),
)
TF32_BAND = 2.0**-10  # a library may form a small product in full precision where ours may round


@dataclass(frozen=True)
class Checked:
    """A subject and what it takes to check it."""

    subject: Subject
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
        if found.said.startswith("OutOfResources"):
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
    subject = Subject("triton", launch.kernel, launch.configuration, dtype)
    merged = {"merge": triton_checks.merged, "merge_many": triton_partners.merged}
    draws = merged.get(launch.kernel)
    noisy = None if draws is None else partial(draws, tile=launch.tile, noise=NOISE)
    shapes = of_rows(launch.width) if launch.width else ALIGNED if launch.bulk else SHAPES
    truth = partial(equations, kernel=launch.kernel)
    run, exact = partial(triton_checks.run, launch), launch.kernel in EXACT
    recipe = (__name__, "of_launch", launch, dtype)
    return Checked(subject, run, noisy, shapes, truth, exact, launch, recipe)


def of_compiled_merge(dtype: str) -> Checked:
    """The compiled kernel for weights of ``dtype``."""
    subject = Subject("cuda", "lora_merge", "any", dtype)
    noisy = partial(cuda_checks.merged, noise=NOISE)
    run, recipe = _compiled_merge, (__name__, "of_compiled_merge", dtype)
    return Checked(subject, run, noisy, exact=True, recipe=recipe)


def _compiled_merge(p: Operands) -> Named:
    return {"w'": cuda_checks.merged(p)}


def of_compiled_grads(form: Form, example: GradShape, dtype: str) -> Checked:
    """The compiled gradients in one form, checked on ``example``."""
    subject = Subject("cuda", "lora_grad", str(form), dtype)
    run = partial(cuda_checks.grads, example=example)
    shapes = (cuda_checks.shape_of(example),)
    recipe = (__name__, "of_compiled_grads", form, example, dtype)
    return Checked(subject, run, shapes=shapes, equations=gradients, exact=True, recipe=recipe)


def of_compiled_product(tile: Tile, dtype: str, behind: str = "") -> Checked:
    """The compiled product in one tile; ``behind`` it gelu, scale or nothing."""
    kernel = f"lora_linear_{behind}" if behind else "lora_linear"
    subject = Subject("cuda", kernel, "{} x {}".format(*tile), dtype)
    run = partial(cuda_checks.run_product, behind=behind, tile=tile)
    truth = partial(equations, kernel=f"extended_{behind}")
    exact = behind != "gelu"
    recipe = (__name__, "of_compiled_product", tile, dtype, behind)
    shapes = cuda_checks.PRODUCTS
    return Checked(subject, run, shapes=shapes, equations=truth, exact=exact, recipe=recipe)
