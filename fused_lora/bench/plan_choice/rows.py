"""One row for each case: the chosen plan, the best one measured, and every other."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from fused_lora.bench.provenance import Provenance
from fused_lora.bench.rows import read_as
from fused_lora.plan.device import Ceilings

SUITE = "plan_choice"


@dataclass(frozen=True)
class PlanCase:
    """One linear and its adapters."""

    suite: str
    m: int
    k: int
    n: int
    groups: int  # adapters on equal column ranges
    rank: int  # of each
    dtype: str

    def __str__(self) -> str:
        grouped = f" in {self.groups} groups" if self.groups > 1 else ""
        return f"{self.m} x {self.k} -> {self.n}{grouped}, rank {self.rank}, {self.dtype}"


@dataclass(frozen=True)
class Candidate:
    """One plan, measured."""

    plan: str  # forward/dx/gradient/keep
    estimate_us: float  # the cost model's
    rounds: int  # fewer than the case's where it was dropped as clearly slower
    median_ms: float
    q1_ms: float
    q3_ms: float
    ratio: float  # median over rounds of its time over the chosen plan's in the same round
    margin: float  # its worst error over the limit of that error; at most 1
    may_win: bool  # False where the plan's precision rules forbid it


@dataclass(frozen=True)
class PlanRow:
    """One case, measured."""

    case: PlanCase
    chosen: str
    best: str  # by the median ratio, among those that may win
    ratio: float  # chosen over best; the best found in half the rounds, the ratio in the others
    over_frozen: float  # chosen over the frozen layer's forward and dx
    rounds: int
    candidates: list[Candidate]
    ceilings: Ceilings  # what the estimates were made with
    provenance: Provenance

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> PlanRow:
        """The row that ``to_json`` wrote."""
        fields = json.loads(line)
        candidates = [Candidate(**each) for each in fields.pop("candidates")]
        case, ceilings = PlanCase(**fields.pop("case")), Ceilings(**fields.pop("ceilings"))
        origin = Provenance(**fields.pop("provenance"))
        return cls(case=case, candidates=candidates, ceilings=ceilings, provenance=origin, **fields)

    def of(self, plan: str) -> Candidate:
        """The candidate called ``plan``."""
        return next(each for each in self.candidates if each.plan == plan)


def read(folder: Path) -> Iterator[PlanRow]:
    """Every row of this suite below ``folder``."""
    return read_as(folder, [SUITE], PlanRow.from_json)


def newest(rows: Iterable[PlanRow]) -> list[PlanRow]:
    """The latest row of each device and case."""
    ordered = sorted(rows, key=lambda row: row.provenance.time_utc)
    return list({(row.provenance.device, row.case): row for row in ordered}.values())
