"""Rows of JSON lines, a file a suite and device."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import asdict, dataclass, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from fused_lora.bench.correctness_gate import Errors
from fused_lora.bench.provenance import Provenance, slug

TIMED = ("host", "six_projections", "train_step", "wecolora_step")  # rows are those of methods
_R = TypeVar("_R", bound="JsonRow")


class JsonRow:
    """A dataclass that is kept as one line of JSON; its fields may be dataclasses, or lists."""

    case: Any
    provenance: Provenance

    def to_json(self) -> str:
        """The line."""
        return json.dumps(asdict(self))  # type: ignore[call-overload]

    @classmethod
    def from_json(cls: type[_R], line: str) -> _R:
        """The row that ``to_json`` wrote."""
        fields = json.loads(line)
        for name, (kind, many) in _nested(cls).items():  # type: ignore[arg-type]
            if name in fields:
                value = fields[name]
                fields[name] = [kind(**each) for each in value] if many else kind(**value)
        return cls(**fields)


@cache
def _nested(cls: type[JsonRow]) -> dict[str, tuple[type, bool]]:
    """The fields that are dataclasses, or lists of one: its class, and whether it is a list."""
    hints = {name: (hint, get_args(hint)) for name, hint in get_type_hints(cls).items()}
    found = {name: (args[0] if args else hint, bool(args)) for name, (hint, args) in hints.items()}
    return {
        name: (kind, many)
        for name, (kind, many) in found.items()
        if isinstance(kind, type) and is_dataclass(kind)
    }


@dataclass(frozen=True)
class Case:
    """What a row is about, all but the method."""

    suite: str
    model: str  # timm's name; six_projections takes its widths
    batch: int
    tokens: int
    rank: int
    dtype: str  # fp32 | bf16 | amp
    mode: str = "eager"  # eager | graph: launched by the host, or replayed
    cache: str = "warm"  # warm | cold: what a GPU's L2 holds when a step begins

    def __str__(self) -> str:
        text = f"{self.model}, batch {self.batch}, rank {self.rank}, {self.dtype}"
        usual = (self.mode, self.cache) == ("eager", "warm")
        return text if usual else f"{text}, {self.mode}, {self.cache} cache"


@dataclass(frozen=True)
class Row(JsonRow):
    """One method in one case, measured."""

    case: Case
    method: str
    form: str  # adapters on a fused qkv: separate (three), joint (one), none
    rounds: int
    median_ms: float  # one step: forward and backward, and the optimizer of a whole step
    q1_ms: float
    q3_ms: float
    ratio_frozen: float | None  # median over rounds of the ratio within a round; None: not run
    ratio_naive: float | None
    ratio_peft: float | None
    errors: Errors  # against float64: y, da, db, and dx where inputs ask for it
    yardstick: Errors  # naive LoRA of the same form in the same dtype
    saved_bytes: int  # unique storages that autograd keeps after the forward pass
    saved_bytes_per_block: int | None  # of the middle block
    wide_copies: int  # fp32 copies of 16-bit activations in the forward pass
    peak_bytes: int | None  # of one step beyond what was allocated; None off CUDA
    provenance: Provenance
    roofline_ms: float | None = None  # no step of this case is faster; None: not computed
    python_calls: int | None = None  # of one step; None: not counted
    host_ms: float | None = None  # of the step, until its last launch is queued; None off CUDA
    operations: int | None = None  # that torch's dispatcher is asked for; None: not counted


@dataclass(frozen=True)
class Refusal:
    """A method that was not timed, or whose time was not recorded, and why."""

    case: Case
    method: str
    reason: str


def append(rows: Iterable[JsonRow], folder: Path) -> list[Path]:
    """Add each row to ``folder/<device>/<suite>.jsonl``; the files touched."""
    touched: dict[Path, None] = {}
    for row in rows:
        path = folder / slug(row.provenance.device) / f"{row.case.suite}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(row.to_json() + "\n")
        touched[path] = None
    return list(touched)


def read(folder: Path) -> Iterator[Row]:
    """Every row of timed methods below ``folder``, oldest first within a file."""
    return read_as(folder, TIMED, Row)


def read_as(folder: Path, suites: Iterable[str], kind: type[_R]) -> Iterator[_R]:
    """The rows of ``suites`` below ``folder``, which are of ``kind``."""
    wanted = set(suites)
    for path in sorted(folder.glob("*/*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines() if path.stem in wanted else ():
            if line.strip():
                yield kind.from_json(line)


def newest(
    rows: Iterable[_R],
    key: Callable[[_R], Hashable] = lambda row: (row.provenance.device, row.case, row.method),  # type: ignore[attr-defined]
) -> list[_R]:
    """The latest row of each device, case and method, or of each ``key``; in order of the first."""
    latest: dict[Hashable, _R] = {}
    for row in rows:
        known = latest.get(key(row))
        if known is None or row.provenance.time_utc >= known.provenance.time_utc:
            latest[key(row)] = row
    return list(latest.values())
