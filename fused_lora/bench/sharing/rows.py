"""One row for each way of a case: launches, bytes, time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from fused_lora.bench.provenance import Provenance
from fused_lora.bench.rows import read_as

SUITE = "sharing"


@dataclass(frozen=True)
class SharingCase:
    """The joint step of two models, adapters on q, k and v."""

    suite: str
    teacher: str  # timm's names
    student: str
    batch: int
    rank: int
    dtype: str  # fp32 | bf16

    def __str__(self) -> str:
        return (
            f"{self.teacher} and {self.student}, batch {self.batch}, rank {self.rank}, {self.dtype}"
        )


@dataclass(frozen=True)
class SharingRow:
    """One way: apart (the student has adapters of its own), slices (autograd's), shared."""

    case: SharingCase
    way: str
    launches: int  # operations that write memory, in one step
    written_bytes: int  # by them
    rounds: int
    median_ms: float
    ratio_apart: float  # median over rounds of the ratio within a round
    provenance: Provenance

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> SharingRow:
        """The row that ``to_json`` wrote."""
        fields = json.loads(line)
        case, origin = SharingCase(**fields.pop("case")), Provenance(**fields.pop("provenance"))
        return cls(case=case, provenance=origin, **fields)


def read(folder: Path) -> Iterator[SharingRow]:
    """Every row of this suite below ``folder``."""
    return read_as(folder, [SUITE], SharingRow.from_json)


def newest(rows: Iterable[SharingRow]) -> list[SharingRow]:
    """The latest row of each device, case and way."""
    ordered = sorted(rows, key=lambda row: row.provenance.time_utc)
    return list({(row.provenance.device, row.case, row.way): row for row in ordered}.values())
