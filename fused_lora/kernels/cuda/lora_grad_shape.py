"""One call of the compiled gradients: dtypes and layout of its operands, and the form that fits."""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_lora.kernels.cuda import native
from fused_lora.kernels.cuda.native import Chip
from fused_lora.kernels.gemm import is_tf32
from fused_lora.kernels.interface import Adapters, InputNorm
from fused_lora.plan.cost_kernels import dh_given
from fused_lora.plan.problem import Problem
from fused_lora.programs.record import begins_at
from fused_lora.types import Keep, Needs, Plan

# Which compiled kernel serves which sizes of ``lora_grads``: its form, and an example of each.
#
# A form is what a check stands for: one compiled kernel, and how many blocks hold a problem
# together.


STEP, WIDEST = 64, 8192  # columns of the examples, a little less than whole steps
RANK_BLOCK = 16
WIDE = ("float32", "tf32")  # dtypes of a problem whose products are of TF32 here


class Form(NamedTuple):
    """A compiled kernel and the size of its cluster."""

    strips: int  # of 16 columns, that a warp holds
    rank_blocks: int  # of 16
    forms: bool  # h or dh on chip
    cluster: int  # blocks that add their parts of h and dh

    def __str__(self) -> str:
        words = f"{self.strips} strips {RANK_BLOCK * self.rank_blocks} ranks"
        if not self.forms:
            return f"{words} given"
        return f"{words} cluster of {self.cluster}" if self.cluster > 1 else words


class GradShape(NamedTuple):
    """The sizes of one problem, and what of it is asked for and given."""

    k: int
    n: int
    ranks: int  # stacked
    h_given: bool = False
    dh_given: bool = False
    needs_a: bool = True
    needs_b: bool = True
    needs_bias: bool = False
    tf32: bool = False  # x, dy, h and dh are fp32, multiplied as TF32; else of 16 bits
    writes_dh: bool = False  # which is then formed whether or not da is asked for

    @property
    def forms_dh(self) -> bool:
        """Whether dh is formed on chip."""
        return (self.needs_a or self.writes_dh) and not self.dh_given

    @property
    def forms(self) -> bool:
        """Whether h or dh is formed on chip."""
        return (self.needs_b and not self.h_given) or self.forms_dh

    def plan(self, rows: int, chip: Chip) -> Any:
        """fused_lora._native.GradPlan; None where no block or cluster holds the problem."""
        module = native.load()
        return module.plan_lora_grad(**self._asdict(), rows=rows, **chip._asdict())

    def form(self, chip: Chip) -> Form | None:
        """What serves it on ``chip``; None where nothing does."""
        plan = self.plan(1, chip)
        if plan is None:
            return None
        cluster = plan.chunks if self.forms else 1
        return Form(plan.most_strips, plan.rank_blocks, self.forms, cluster)


@lru_cache(maxsize=4096)
def fitting(shape: GradShape, chip: Chip) -> GradShape:
    """``shape``, or what fits ``chip`` of it: dbias apart, then h and dh given."""
    apart = shape._replace(needs_bias=False)
    given = shape._replace(h_given=True, dh_given=True)
    both = given._replace(needs_bias=False)
    return next((s for s in (shape, apart, given) if s.form(chip)), both)


def shape_of(p: Problem, plan: Plan) -> GradShape:
    """What ``plan`` leaves to the compiled gradients."""
    needs = p.needs
    given = (plan.keep is Keep.HIDDEN, dh_given(p, plan))
    tf32 = p.dtype in WIDE
    asked = (needs.a, needs.b, needs.bias)
    return GradShape(p.k, p.n, p.rank, *given, *asked, tf32, plan.writes_dh)


@lru_cache(maxsize=16)
def examples(chip: Chip, tf32: bool = False) -> dict[Form, GradShape]:
    """A square problem for every form that a chip has, the narrowest that fills its warps.

    Of 16-bit or of TF32 products: other kernels each.
    """
    found: dict[Form, GradShape] = {}
    widths, granule = range(STEP, WIDEST + 1, STEP), 4 if tf32 else 8
    for width, blocks, given in product(widths, range(1, 5), (False, True)):
        size, ranks = width - granule, RANK_BLOCK * blocks - 1
        shape = GradShape(size, size, ranks, given, given, needs_bias=True, tf32=tf32)
        form, plan = shape.form(chip), shape.plan(1, chip)
        if form is None or (form in found and found[form].plan(1, chip).full):
            continue
        if form not in found or plan.full:
            found[form] = shape
    return found


ADAPTERS = (torch.float32, torch.bfloat16, torch.float16)  # dtypes of a and b


LARGE = (torch.float32, torch.bfloat16, torch.float16)  # dtypes of x, dy, h and dh


class GradCall(NamedTuple):
    """What ``lora_grads`` is given."""

    x: Tensor | None  # [M, K]
    dy: Tensor | None  # [M, N]
    adapters: Adapters
    needs: Needs
    h: Tensor | None  # [M, sum R]
    dh: Tensor | None  # [M, sum R]
    writes_dh: bool = False  # where it is formed

    @property
    def large(self) -> dict[str, Tensor]:
        """Those of the operands of M rows that are there."""
        named = dict(x=self.x, dy=self.dy, h=self.h, dh=self.dh)
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def small(self) -> list[Tensor]:
        """Every a and b."""
        return [*self.adapters.a, *self.adapters.b]

    @property
    def first(self) -> Tensor:
        """The operand that tells device, dtype and rows."""
        return next(iter(self.large.values()))

    @property
    def shape(self) -> GradShape:
        """Its sizes."""
        return GradShape(
            k=0 if self.x is None else self.x.shape[1],
            n=0 if self.dy is None else self.dy.shape[1],
            ranks=self.adapters.rank,
            h_given=self.h is not None,
            dh_given=self.dh is not None,
            needs_a=self.needs.a,
            needs_b=self.needs.b,
            needs_bias=self.needs.bias,
            tf32=self.first.dtype is torch.float32,
            writes_dh=self.writes_dh,
        )

    def plan(self, chip: Chip) -> Any:
        """fused_lora._native.GradPlan; None where a block of this chip cannot hold the problem."""
        return self.shape.plan(self.first.shape[0], chip)

    def why_not(self, chip: Chip) -> str | None:
        """One sentence why the compiled kernel cannot serve; None when it can."""
        return self.why_not_operands() or (None if self.plan(chip) else self.too_large(chip))

    def why_not_operands(self) -> str | None:
        """The part of ``why_not`` that no chip enters."""
        return self._why_not_missing() or self._why_not_types() or self._why_not_rows()

    def why_not_written(self, dh_out: Tensor | None) -> str | None:
        """One sentence why dh cannot be written to ``dh_out`` as it is formed."""
        if dh_out is None:
            return None
        if self.dh is not None:
            return "dh is not formed here: it is given"
        wanted = (self.first.shape[0], self.adapters.rank)
        if dh_out.shape != wanted or dh_out.dtype is not self.first.dtype or dh_out.stride(1) != 1:
            seen = f"{tuple(dh_out.shape)} {dh_out.dtype} {dh_out.stride()}"
            return f"dh is written as {wanted} {self.first.dtype}, rows contiguous, got {seen}"
        return None

    def why_not_activated(self, activation: str) -> str | None:
        """One sentence why x cannot be formed as GELU of what is given in its place."""
        if activation == "none" or self.first.dtype.itemsize == 2:
            return None
        return f"x is formed of a u of 16 bits, got {self.first.dtype}"

    def why_not_normed(self, norm: InputNorm | None) -> str | None:
        """One sentence why x cannot be formed as the LayerNorm of what is given in its place."""
        if norm is None:
            return None
        if self.x is None:
            return "x is formed of what is given in its place, and nothing is"
        return why_not_norm(norm, self.x)

    def too_large(self, chip: Chip) -> str:
        """What to say where there is no plan."""
        sizes = ", ".join(f"{name} {tuple(z.shape)}" for name, z in self.large.items())
        return f"a block of sm_{chip.arch} cannot hold rank {self.adapters.rank} of {sizes}"

    def _why_not_missing(self) -> str | None:
        forms_h = self.needs.b and self.h is None
        forms_dh = (self.needs.a or self.writes_dh) and self.dh is None
        if self.x is None and (self.needs.a or forms_h):
            return "x is needed"
        if self.dy is None and (self.needs.b or self.needs.bias or forms_dh):
            return "dy is needed"
        most = native.load().grad_most_groups
        if len(self.adapters.spans) > most:
            return f"{len(self.adapters.spans)} adapters share this layer; {most} are served"
        return None

    def _why_not_types(self) -> str | None:
        dtypes = {tensor.dtype for tensor in self.large.values()}
        if len(dtypes) > 1 or not dtypes <= {*LARGE}:
            return (
                f"{', '.join(self.large)} must be all of one dtype, of float32, bfloat16 and "
                f"float16, got {_list(dtypes)}"
            )
        if reason := why_not_dtype(self.first.dtype):
            return reason
        dtypes = {tensor.dtype for tensor in self.small}
        if len(dtypes) > 1 or torch.float64 in dtypes:
            return f"a and b must have one dtype, not float64, got {_list(dtypes)}"
        devices = {tensor.device for tensor in (*self.large.values(), *self.small)}
        return f"operands lie on {_list(devices)}" if len(devices) > 1 else None

    def _why_not_rows(self) -> str | None:
        for name, z in self.large.items():
            if z.stride(1) != 1 and z.shape[1] > 1:
                return f"rows of {name} are not contiguous"
            if name in ("x", "dy") and not (_begins(z) and whole(z.shape[1], z.dtype)):
                return f"{name} or its rows do not begin at multiples of 16 bytes"
        return None


def why_not_dtype(dtype: torch.dtype) -> str | None:
    """One sentence why x and dy of ``dtype`` are not served at this moment; None when they are."""
    if dtype is not torch.float32 or is_tf32(dtype):
        return None
    setting = torch.backends.cuda.matmul.fp32_precision
    return (
        "the compiled gradients multiply float32 as TF32, which torch does not allow: "
        f"torch.backends.cuda.matmul.fp32_precision is {setting!r}"
    )


def why_not_norm(norm: InputNorm, z: Tensor) -> str | None:
    """One sentence why x is not formed as the LayerNorm of ``z`` [M, K]; None when it can be."""
    if z.dtype.itemsize != 2:
        return f"x is formed of the input of a LayerNorm of 16 bits, got {z.dtype}"
    (rows, columns), (mean, rstd, gamma, beta) = z.shape, norm
    for name, statistic in (("mean", mean), ("rstd", rstd)):
        if reason := _why_not_vector(name, statistic, rows, (torch.float32,), z.device):
            return reason
    there = [(name, t) for name, t in (("gamma", gamma), ("beta", beta)) if t is not None]
    for name, vector in there:
        if reason := _why_not_vector(name, vector, columns, ADAPTERS, z.device):
            return reason
        if begins_at(vector) % 16:
            return f"{name} does not begin at a multiple of 16 bytes"
    dtypes = {vector.dtype for _, vector in there}
    return f"gamma and beta must have one dtype, got {_list(dtypes)}" if len(dtypes) > 1 else None


def _why_not_vector(
    name: str, t: Tensor, size: int, dtypes: tuple[torch.dtype, ...], device: torch.device
) -> str | None:
    fits = tuple(t.shape) == (size,) and t.dtype in dtypes and t.device == device
    if fits and t.is_contiguous():
        return None
    wanted = " or ".join(map(str, dtypes))
    seen = f"{tuple(t.shape)} {t.dtype} with strides {t.stride()} on {t.device}"
    return f"{name} must be ({size},) {wanted}, contiguous, on {device}, got {seen}"


def aligned(z: Tensor) -> Tensor:
    """``z`` [M, C], copied unless every row begins at a multiple of 16 bytes."""
    return z if z.stride(1) == 1 and _begins(z) else z.clone(memory_format=torch.contiguous_format)


def _begins(z: Tensor) -> bool:
    return whole(z.stride(0), z.dtype) and begins_at(z) % 16 == 0


def whole(elements: int, dtype: torch.dtype) -> bool:
    """Whether so many elements are a multiple of 16 bytes."""
    return elements * dtype.itemsize % 16 == 0


def _list(things: set[Any]) -> str:
    return " and ".join(sorted(map(str, things)))
