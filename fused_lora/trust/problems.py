"""Small problems that a check runs: odd sizes, several groups, operands inside larger tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_lora.kernels.interface import Adapters
from fused_lora.types import Span


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
