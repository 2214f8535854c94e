"""What a check found, and how it reads on disk and to people."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fused_lora.testing.yardstick import Comparison
from fused_lora.testing.yardstick import worst as most_taken


@dataclass(frozen=True)
class Subject:
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
    said: str  # the quantity compared, or the exception

    @property
    def compared(self) -> bool:
        """Whether there is an error to speak of."""
        return self.budget > 0

    def __str__(self) -> str:
        if not self.compared:
            return self.said
        word = "within" if self.passed else "over"
        return f"error {self.error:.2e} of {self.said} is {word} the budget {self.budget:.2e}"

    def row(self) -> dict[str, Any]:
        """As it is kept."""
        return asdict(self) | {"error": repr(self.error), "budget": repr(self.budget)}

    @classmethod
    def of_row(cls, row: object) -> Verdict | None:
        """What ``row`` gave; None where it has another form or contradicts itself."""
        try:
            fields = dict(row)  # type: ignore[call-overload]
            error, budget = float(fields["error"]), float(fields["budget"])
            found = cls(fields["passed"], error, budget, str(fields["said"]))
        except (TypeError, ValueError, KeyError):
            return None
        return found if found.passed is (error <= budget) else None


def worst(comparisons: list[Comparison]) -> Verdict:
    """The comparison that leaves least of its budget."""
    least = most_taken(comparisons)
    return Verdict(least.passed, least.ours, least.budget, least.name)


def broken(said: str) -> Verdict:
    """Of a check that could not compare."""
    return Verdict(False, float("inf"), 0.0, said)
