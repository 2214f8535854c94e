"""The words every room shares: strategies, roles, column spans, and the plan a problem ends in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


class Forward(str, Enum):
    """How ``y = x wT + bias + s (x aT) bT``, and likewise dx, is computed (DESIGN.md section 2)."""

    SEPARATE = "separate"  # base GEMM, then the expand accumulates into its output
    BORDERED = "bordered"  # one GEMM over [x | h] and [w | s b]: one accumulator, one rounding
    EXTENDED = "extended"  # the same without the copies: a GEMM whose K loop runs on over (h, s b)
    ONE_PASS = "one_pass"  # each tile shrinks the x it reads, then expands: x is read once
    MERGE = "merge"  # one GEMM over w' = w + s b a, rebuilt each step
    OPEN = "open"  # base GEMM alone: whoever reads its output next adds the low-rank term


class Gradient(str, Enum):
    """How the adapter gradients db and da are computed (DESIGN.md section 2)."""

    RANK = "rank"  # from h and dh: db = s dyT h, da = dhT x
    FULL = "full"  # from dw = dyT x: db = s dw aT, da = s bT dw
    NONE = "none"  # no adapter operand needs one


class Keep(str, Enum):
    """What the forward keeps for backward beyond x, at most the bytes of h."""

    NOTHING = "nothing"
    HIDDEN = "hidden"  # h, [M, sum R]
    MERGED = "merged"  # w', [N, K]


class Backend(str, Enum):
    """Whose kernels a plan runs on; frozen-sized GEMMs are the library's in each of them."""

    ATEN = "aten"
    TRITON = "triton"
    CUDA = "cuda"


class Impl(str, Enum):
    """Who computes an operation; ``auto`` lets the plan choose."""

    AUTO = "auto"
    ATEN = "aten"
    TRITON = "triton"
    CUDA = "cuda"
    REFERENCE = "reference"


class Role(str, Enum):
    """The six projections of a transformer block."""

    Q = "q"
    K = "k"
    V = "v"
    OUT = "out"
    FC1 = "fc1"
    FC2 = "fc2"


ALL_ROLES: tuple[Role, ...] = tuple(Role)


@dataclass(frozen=True)
class Span:
    """The columns ``[start, stop)`` of y that one adapter owns, and its rank."""

    start: int  # first column of y, inclusive
    stop: int  # last column of y, exclusive
    rank: int  # R of this adapter

    @property
    def width(self) -> int:
        """Columns owned."""
        return self.stop - self.start


class FusionContext(NamedTuple):
    """What lies beside a product in a chain, and may be part of its pass."""

    bordered: bool = False  # x is written into the left of [x | h] by whoever makes it
    activated: bool = False  # y goes on through GELU, and both are written
    input_activated: bool = False  # x is a GELU's, so that dx goes on through its derivative
    shrunk: bool = False  # h is formed by whoever makes x
    joined: bool = False  # y is scaled and added to a residual
    packed_with: int = 1  # linears of one operation, this among them, packed in one launch
    expanded: bool = False  # whoever reads y may add s h bT as it reads
    input_expanded: bool = False  # and whoever reads dx, dh a
    hidden_grad: bool = False  # dh is formed by whoever forms dy


NO_CONTEXT = FusionContext()


def ragged(spans: Sequence[Span]) -> bool:
    """Whether there are several adapters, of ranks that the matrix instructions' 16 divides not."""
    return len(spans) > 1 and any(span.rank % 16 for span in spans)


def even(spans: Sequence[Span], n: int) -> bool:
    """Whether several adapters of one rank share the ``n`` columns out evenly, as q, k and v do."""
    first, width = spans[0], spans[0].width
    return (
        len(spans) > 1
        and all(
            (span.start, span.width, span.rank) == (i * width, width, first.rank)
            for i, span in enumerate(spans)
        )
        and len(spans) * width == n
    )


@dataclass(frozen=True)
class Needs:
    """Which gradients a backward pass is asked for."""

    x: bool = True
    w: bool = False
    bias: bool = False
    a: bool = True
    b: bool = True


class AdapterTraits(NamedTuple):
    """What of the adapters costs a library calls of its own, beside their shapes."""

    dtype: str = ""  # of a and b; "" for that of the products
    scaled: tuple[bool, ...] = ()  # by adapter, whether s is not 1; () where none is
    one_scale: bool = True  # whether all s are the same


DEFAULT_TRAITS = AdapterTraits()


@dataclass(frozen=True)
class Plan:
    """One way to compute one problem, forward and backward."""

    forward: Forward
    dx: Forward
    gradient: Gradient
    keep: Keep
    time_us: float = 0.0  # the cost model's estimate, forward and backward together
    backend: Backend = Backend.ATEN
    grads_by: Backend | None = None  # who computes RANK gradients; None: ``backend``
    dropped_by: Backend | None = None  # who masks the x of a; None: nobody
    slices: int = 0  # of rows, or clusters of them, whose sums ``grads_by`` adds up; 0 if unknown
    writes_dh: bool = False  # whether ``grads_by`` comes before dx, and writes the dh that dx reads

    @property
    def gradient_backend(self) -> Backend:
        """Who computes the adapter gradients."""
        return self.grads_by or self.backend

    @property
    def library_alone(self) -> bool:
        """Whether no kernel of this project runs."""
        return self.backend is self.gradient_backend is Backend.ATEN

    def __str__(self) -> str:
        gradient = self.gradient.value
        if self.grads_by:
            gradient = f"{self.grads_by.value}:{gradient}"
        parts = "/".join((self.forward.value, self.dx.value, gradient, self.keep.value))
        return parts if self.backend is Backend.ATEN else f"{self.backend.value}:{parts}"
