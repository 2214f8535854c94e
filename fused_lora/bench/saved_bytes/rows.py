"""One row for each method and precision: the bytes a block keeps, and its copies of x in fp32."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from fused_lora.bench.provenance import Provenance
from fused_lora.bench.rows import read_as

SUITE = "saved_bytes"


@dataclass(frozen=True)
class SavedCase:
    """The network of which the middle block is counted."""

    suite: str
    model: str  # timm's name, its first blocks
    blocks: int
    batch: int
    tokens: int
    width: int  # d
    rank: int
    dtype: str  # fp32 | bf16 | amp

    @property
    def unit(self) -> int:
        """Bytes of one [M, d] tensor in the precision of the matmuls."""
        return self.batch * self.tokens * self.width * (4 if self.dtype == "fp32" else 2)

    def __str__(self) -> str:
        return f"{self.model}, batch {self.batch}, rank {self.rank}, {self.dtype}"


@dataclass(frozen=True)
class SavedRow:
    """One method in one case, counted."""

    case: SavedCase
    contender: str
    form: str  # adapters on a fused qkv: separate (three), joint (one), none
    bytes_per_block: int  # unique storages that the middle block keeps for backward
    fp32_bytes_per_block: int  # the part of it that is fp32
    weight_bytes_per_block: int  # the part of it that is 16-bit casts of weights
    units_per_block: float  # the rest, activations, in [M, d] tensors of the matmuls' precision
    fp32_copies_per_block: float  # 16-bit activations that the forward pass copied to fp32
    provenance: Provenance
    bytes_in_all: int = 0  # that the network's blocks and all around them keep; 0: not recorded

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> SavedRow:
        """The row that ``to_json`` wrote."""
        fields = json.loads(line)
        case, origin = SavedCase(**fields.pop("case")), Provenance(**fields.pop("provenance"))
        return cls(case=case, provenance=origin, **fields)


def read(folder: Path) -> Iterator[SavedRow]:
    """Every row of this suite below ``folder``."""
    return read_as(folder, [SUITE], SavedRow.from_json)


def newest(rows: Iterable[SavedRow]) -> list[SavedRow]:
    """The latest row of each case and method; counts are the same on every device."""
    ordered = sorted(rows, key=lambda row: row.provenance.time_utc)
    return list({(row.case, row.contender): row for row in ordered}.values())
