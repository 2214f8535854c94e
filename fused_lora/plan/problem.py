"""The question the plan answers: one grouped LoRA linear, in integers (DESIGN.md section 2)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from fused_lora.types import ALIKE, Halves, Needs, Span

ITEMSIZE = {"float64": 8, "float32": 4, "tf32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Problem:
    """The shapes, the dtype and the gradients of one call."""

    m: int  # rows of x: batch x tokens
    k: int  # in_features
    n: int  # out_features
    spans: tuple[Span, ...]  # one per adapter
    dtype: str = "float32"  # what the GEMMs compute in: a key of ITEMSIZE
    bias: bool = True
    needs: Needs = Needs()
    bordered: bool = False  # this and the next three: see ``fused_lora.types.Beside``
    activated: bool = False
    sloped: bool = False
    shrunk: bool = False
    halves: Halves = ALIKE
    device: str = "cpu"  # its kind

    @cached_property
    def rank(self) -> int:
        """Stacked rank, sum of R_g."""
        return sum(span.rank for span in self.spans)

    @cached_property
    def itemsize(self) -> int:
        """Bytes per element."""
        return ITEMSIZE[self.dtype]

    @property
    def low_precision(self) -> bool:
        """Whether rounding y twice can hide the adapter's own signal (DESIGN.md section 3)."""
        return self.itemsize == 2

    @property
    def wide(self) -> str:
        """What w' is formed in."""
        return "float64" if self.dtype == "float64" else "float32"

    def casts(self, dtype: str = "") -> bool:
        """Whether a and b are of another dtype than ``dtype``, or than the products."""
        one, other = self.halves.dtype or self.dtype, dtype or self.dtype
        return one.replace("tf32", "float32") != other.replace("tf32", "float32")

    def scaled(self, g: int) -> bool:
        """Whether adapter g's s is not 1."""
        return bool(self.halves.scaled) and self.halves.scaled[g]

    @property
    def trains_adapters(self) -> bool:
        """Whether any adapter operand needs a gradient."""
        return self.needs.a or self.needs.b

    @property
    def trains(self) -> bool:
        """Whether there is a backward pass at all."""
        return self.trains_adapters or self.needs.x or self.needs.w or self.needs.bias
