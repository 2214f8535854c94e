"""One check: a kernel's results on small problems beside float64 equations, and its verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fused_lora.kernels.interface import Adapters
from fused_lora.reference import lora_linear as reference
from fused_lora.reference.philox import stochastic_round
from fused_lora.testing.yardstick import Comparison, judge
from fused_lora.testing.yardstick import worst as most_taken
from fused_lora.types import Needs, Span


@dataclass(frozen=True)
class KernelId:
    """What is checked at one time: one kernel in one configuration class and dtype."""

    backend: str
    kernel: str
    configuration: str  # a tile, or the dtypes of the other operands
    dtype: str  # as the plan names it; tf32 is fp32 that torch may round

    def __str__(self) -> str:
        return f"{self.backend} {self.kernel} ({self.configuration}) in {self.dtype}"


@dataclass(frozen=True)
class Verdict:
    """The worst comparison of a check, or what stopped it."""

    passed: bool
    error: float
    budget: float  # 0 where nothing could be compared
    reason: str  # the quantity compared, or the exception

    @property
    def compared(self) -> bool:
        """Whether there is an error to speak of."""
        return self.budget > 0

    def __str__(self) -> str:
        if not self.compared:
            return self.reason
        word = "within" if self.passed else "over"
        return f"error {self.error:.2e} of {self.reason} is {word} the budget {self.budget:.2e}"

    def row(self) -> dict[str, Any]:
        """As it is kept."""
        return asdict(self) | {"error": repr(self.error), "budget": repr(self.budget)}

    @classmethod
    def of_row(cls, row: object) -> Verdict | None:
        """What ``row`` gave; None where it has another form or contradicts itself."""
        try:
            fields = dict(row)  # type: ignore[call-overload]
            error, budget = float(fields["error"]), float(fields["budget"])
            found = cls(fields["passed"], error, budget, str(fields["reason"]))
        except (TypeError, ValueError, KeyError):
            return None
        return found if found.passed is (error <= budget) else None


def worst(comparisons: list[Comparison]) -> Verdict:
    """The comparison that leaves least of its budget."""
    least = most_taken(comparisons)
    return Verdict(least.passed, least.ours, least.budget, least.name)


def broken(reason: str) -> Verdict:
    """Of a check that could not compare."""
    return Verdict(False, float("inf"), 0.0, reason)


@dataclass(frozen=True)
class Shape:
    """One problem, and what it may show."""

    m: int
    k: int
    n: int
    spans: tuple[Span, ...]
    bias: bool
    wide: bool  # fp32 adapters, packed beforehand; else in the compute dtype
    inside: int  # columns of the tensor that x and dy lie in beyond their own
    frozen: bool = True  # a w, which gradients of adapters do without


SHAPES = (  # sizes that no block divides; whole blocks, with borders of groups inside a tile
    Shape(197, 71, 93, (Span(0, 93, 5),), bias=True, wide=False, inside=3),
    Shape(256, 256, 384, tuple(Span(128 * g, 128 * g + 128, 16) for g in range(3)), False, True, 0),
)

ALIGNED = (  # the first in rows of whole 16 bytes, for what reads by descriptors
    Shape(197, 72, 88, (Span(0, 88, 5),), bias=True, wide=False, inside=8),
    SHAPES[1],
)


RARE = 1.5  # deviations: one operand in seven is 1 or -1 in an exact problem, the others are 0


@dataclass(frozen=True)
class Operands:
    """Tensors of one problem in one dtype."""

    x: Tensor  # [M, K]
    w: Tensor  # [N, K], or of no elements
    bias: Tensor | None  # [N]
    dy: Tensor  # [M, N]
    adapters: Adapters
    gamma: Tensor  # [K], in the adapters' dtype, as are the next two
    beta: Tensor  # [K]
    factor: Tensor  # [N]

    def to(self, dtype: torch.dtype, adapters: bool = True) -> Operands:
        """The same numbers in ``dtype``."""
        x, w, dy = (t.to(dtype) for t in (self.x, self.w, self.dy))
        bias = None if self.bias is None else self.bias.to(dtype)
        low = self.adapters.to(dtype) if adapters else self.adapters
        vectors = (t.to(dtype) if adapters else t for t in (self.gamma, self.beta, self.factor))
        return Operands(x, w, bias, dy, low, *vectors)


def problems(
    dtype: torch.dtype,
    device: torch.device,
    shapes: Sequence[Shape] = SHAPES,
    exact: bool = False,
) -> Iterator[Operands]:
    """The operands of every shape; no random state but their own is touched.

    Of ``exact`` ones every product and sum is a small integer or half, which any dtype holds.
    """
    generator = torch.Generator().manual_seed(20)
    for shape in shapes:
        yield _operands(shape, dtype, device, generator, exact)


def of_rows(width: int) -> tuple[Shape, ...]:
    """Rows that fill a block, and rows that just ask for one and lie in a wider tensor."""
    one = (Span(0, 1, 1),)
    narrow = Shape(19, width // 2 + 3, 1, one, bias=True, wide=False, inside=3)
    return Shape(21, width, 1, one, bias=False, wide=True, inside=0), narrow


def of_ranks(block: int) -> tuple[Shape, ...]:
    """As ``SHAPES``, with ranks of three adapters that fill a block of them."""
    odd, whole = SHAPES
    ranks = (block // 4, block // 4, block // 2)
    spans = tuple(replace(span, rank=r) for span, r in zip(whole.spans, ranks, strict=True))
    return odd, replace(whole, spans=spans)


def _operands(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
    exact: bool,
) -> Operands:
    def draw(rows: int, columns: int, std: float, to: torch.dtype, inside: int = 0) -> Tensor:
        whole = torch.randn(rows, columns + inside, generator=generator)
        whole = whole.sign() * (whole.abs() > RARE) if exact else whole * std
        return whole.to(device, to)[:, :columns]

    m, k, n, inside = shape.m, shape.k, shape.n, shape.inside
    low = torch.float32 if shape.wide else dtype
    a = [draw(s.rank, k, k**-0.5, low) for s in shape.spans]
    b = [draw(s.rank, s.width, s.rank**-0.5, low).t() for s in shape.spans]
    scales = [(0.5, 1.0, 2.0)[g % 3] for g in range(len(a))]  # of one adapter not 1
    bias = draw(1, n, 1.0, dtype)[0] if shape.bias else None
    x, dy = draw(m, k, 1.0, dtype, inside), draw(m, n, 1.0, dtype, inside)
    w = draw(*((n, k) if shape.frozen else (0, 0)), k**-0.5, dtype)
    gamma, beta, factor = (draw(1, size, 1.0, low)[0] for size in (k, k, n))
    adapters = Adapters(a, b, scales, shape.spans)
    return Operands(x, w, bias, dy, adapters, gamma, beta, factor)


Named = Mapping[str, Tensor]


def equations(p: Operands, kernel: str = "") -> Named:
    """Every result of ``kernel`` by name, and maybe others."""
    from fused_lora.verify.elementwise import EQUATIONS

    return EQUATIONS.get(kernel, products)(p)


def products(p: Operands) -> Named:
    """Those of lora_linear and of the merge."""
    a, b, scales, spans = p.adapters
    h, dh = thin(p)
    y = reference.forward(p.x, p.w, p.bias, *p.adapters)
    grads = reference.backward(p.dy, p.x, p.w, *p.adapters, Needs())
    merged = p.w.clone()
    for a_g, b_g, s_g, span in zip(a, b, scales, spans, strict=True):
        merged[span.start : span.stop] += s_g * (b_g @ a_g)
    assert grads.x is not None
    da, db = flat(grads.a), flat(grads.b)
    return {"h": h, "dh": dh, "y": y, "dx": grads.x, "da": da, "db": db, "w'": merged}


def gradients(p: Operands) -> Named:
    """What ``equations`` has of adapters' gradients, that of the bias, and dh; without w."""
    h, dh = thin(p)
    low = p.adapters.to(p.x.dtype)
    da = dh.T @ p.x
    db = [low.scales[g] * p.dy[:, cols].T @ h[:, ranks] for g, cols, ranks in low.ranks()]
    return {"da": da.flatten(), "db": flat(db), "dbias": p.dy.sum(0), "dh": dh}


def thin(p: Operands) -> tuple[Tensor, Tensor]:
    """h and dh; given to the kernels that read them, so that one is judged at a time."""
    a, b, scales, spans = p.adapters.to(p.x.dtype)
    dh = [s * p.dy[:, c.start : c.stop] @ b_g for s, c, b_g in zip(scales, spans, b, strict=True)]
    return p.x @ torch.cat(tuple(a)).T, torch.cat(dh, 1)


def flat(tensors: Sequence[Tensor | None]) -> Tensor:
    """A group's gradients as one vector: apart, one element would be judged by one rounding."""
    return torch.cat([t.flatten() for t in tensors if t is not None])


NOISE = (2**63 + 5, 2**40 + 1)  # seed and step, with bits in all four words


def stochastic(p: Operands, merged: Callable[[Operands], Tensor]) -> Iterator[str]:
    """A complaint unless ``merged`` draws the reference's bits wherever an adapter acts."""
    exact = _exact(p)
    sums, acts = p.w.double(), torch.zeros(len(p.w), dtype=torch.bool, device=p.w.device)
    for a_g, b_g, s_g, span in zip(*exact.adapters, strict=True):
        sums[span.start : span.stop] += s_g * (b_g.double() @ a_g.double())
        acts[span.start : span.stop] = True
    truth = stochastic_round(sums.float(), p.w.dtype, *NOISE)
    if not torch.equal(merged(exact)[acts], truth[acts]):
        yield "stochastic rounding does not draw the reference's bits"


def _exact(p: Operands) -> Operands:
    """The same problem with a and b in eighths: their products sum exactly in fp32."""
    a, b = ([(4 * t).round() / 8 for t in half] for half in (p.adapters.a, p.adapters.b))
    return replace(p, adapters=p.adapters._replace(a=a, b=b))


# A check: one kernel on small problems against float64, by the yardstick rule, twice.
#
# In 16 bits an element may be wrong by a hundredth and still look rounded, so products are formed
# of small integers as well, where every result is exact and is asked for to the bit.
#
# It runs in a thread and on a stream of its own, where no autocast, mode or capture of the caller's
# reaches, and draws from no random state but its own. Running out of memory is nobody's verdict.


class CannotVerifyNow(Exception):
    """Nothing can be checked at this moment; asked again later, it may be."""


class OutOfMemory(CannotVerifyNow):
    """Nothing can be checked for want of memory or of a process: not worth asking at once again."""


def check(
    cases: Callable[[torch.dtype, torch.device], Iterator[Comparison | str]],
    dtype: torch.dtype,
    device: torch.device,
) -> Verdict:
    """The verdict on what ``cases`` yields: comparisons, or a sentence that fails the kernel.

    Raises:
        OutOfMemory: the device's memory is full.
    """
    with ThreadPoolExecutor(1, "fused_lora check") as own:
        return own.submit(_check, cases, dtype, device).result()


def _check(
    cases: Callable[[torch.dtype, torch.device], Iterator[Comparison | str]],
    dtype: torch.dtype,
    device: torch.device,
) -> Verdict:
    try:
        with torch.inference_mode(), own_stream(device):
            found = list(cases(dtype, device))
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(f"no memory is left to check a kernel in: {error}") from None
    except Exception as error:  # of a compiler, a launch or the device: the kernel does not serve
        if _out_of_memory(error):
            raise OutOfMemory(f"no memory is left to check a kernel in: {error}") from None
        return broken(f"{type(error).__name__}: {_first_line(error)}")
    compared = [c for c in found if isinstance(c, Comparison)]
    complaints = [line for line in found if isinstance(line, str)]
    return (
        broken(complaints[0]) if complaints and all(c.passed for c in compared) else worst(compared)
    )


def _out_of_memory(error: BaseException) -> bool:
    """Whether ``error``, or what it came from, is a full memory by its own words."""
    words = str(error).lower()
    cause = error.__cause__ or error.__context__
    full = isinstance(error, MemoryError) or "out of memory" in words
    return full or (cause is not None and _out_of_memory(cause))


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else "no message"


@contextmanager
def products_as(dtype: str) -> Iterator[None]:
    """Inside, torch forms fp32 products as ``dtype`` says."""
    setting = torch.backends.cuda.matmul
    before = setting.fp32_precision
    setting.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    try:
        yield
    finally:
        setting.fp32_precision = before


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Inside, work goes to a fresh stream of ``device``, finished at the end."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()


def compare(
    run: Callable[[], Mapping[str, Tensor]],
    plain: Sequence[Mapping[str, Tensor]],
    truth: Mapping[str, Tensor],
    dtype: torch.dtype,
    band: float | None,
) -> Iterator[Comparison | str]:
    """``run`` against ``truth``, beside every ``plain``; and against itself, bit by bit.

    A name of what ``run`` gives may say after a comma how it was found.
    """
    once, again = run(), run()
    for name, ours in once.items():
        if not torch.equal(ours, again[name]):
            yield f"two runs gave different bits of {name}"
        quantity = name.partition(",")[0]
        theirs = [found[quantity] for found in plain]
        yield judge(name, ours, theirs, truth[quantity], dtype, band)


def compare_exact(ours: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> Iterator[str]:
    """A complaint for each of ``ours`` that is not ``truth`` to the bit."""
    for name, found in ours.items():
        right = truth[name.partition(",")[0]].to(found.dtype)
        if found.shape != right.shape or not torch.equal(found, right):
            yield f"{name} is not exact where small integers make it so"
