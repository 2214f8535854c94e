"""``fused-lora bench --suite sharing``: a student's slices of its teacher's adapters."""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby, product
from pathlib import Path
from typing import Any
from unittest.mock import patch as substituted

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fused_lora
from fused_lora.bench.clock import clock_for, interleave
from fused_lora.bench.provenance import Provenance, provenance
from fused_lora.bench.registry import job
from fused_lora.bench.rows import JsonRow, append, read_as
from fused_lora.bench.rows import newest as latest
from fused_lora.bench.shapes import SHAPES, Grid, ModelShape
from fused_lora.bench.table import aligned, markdown_table, milliseconds
from fused_lora.bench.workload import STORED
from fused_lora.distill.slad import Logits, slad_losses
from fused_lora.nn import AdaptedLinear, shared_parameters
from fused_lora.testing.yardstick import error

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
class SharingRow(JsonRow):
    """One variant: apart (the student has adapters of its own), slices (autograd's), shared."""

    case: SharingCase
    variant: str
    launches: int  # operations that write memory, in one step
    written_bytes: int  # by them
    rounds: int
    median_ms: float
    ratio_apart: float  # median over rounds of the ratio within a round
    provenance: Provenance


def read(folder: Path) -> Iterator[SharingRow]:
    """Every row of this suite below ``folder``."""
    return read_as(folder, [SUITE], SharingRow)


def newest(rows: Iterable[SharingRow]) -> list[SharingRow]:
    """The latest row of each device, case and variant."""
    return latest(rows, lambda row: (row.provenance.device, row.case, row.variant))


NAMES = {
    "apart": "adapters of its own",
    "slices": "parts, by autograd's slices",
    "shared": "parts, by `share_adapters`",
}
DOCS_HEADS = ("the student's adapters", "launches", "MB written", "ms", "x its own")


def markdown_lines(rows: Sequence[SharingRow]) -> Iterator[str]:
    """A sentence and a table for each device and case; nothing without rows."""
    ordered = sorted(rows, key=lambda row: (row.provenance.device, str(row.case)))
    for (device, case), group in groupby(ordered, key=lambda r: (r.provenance.device, r.case)):
        found = list(group)
        origin = found[0].provenance
        yield f"**{device}**, the joint step of a student that shares adapters, {case}:"
        yield _markdown(found)
        yield (
            f"{min(row.rounds for row in found)} interleaved rounds; launches are operations that "
            f"write memory; {origin.threads} threads, torch {origin.torch}; commit "
            f"{origin.commit}; {origin.time_utc}."
        )


def _markdown(rows: Sequence[SharingRow]) -> str:
    lines = []
    by_variant = {row.variant: row for row in rows}
    for row in (by_variant[variant] for variant in NAMES if variant in by_variant):
        written = f"{row.written_bytes / 1e6:.1f}"
        time = milliseconds(row.median_ms), f"{row.ratio_apart:.3f}"
        lines.append((NAMES[row.variant], str(row.launches), written, *time))
    return markdown_table(DOCS_HEADS, lines)


STUDENTS = {
    "vit_small_patch16_224": "vit_tiny_patch16_224",
    "vit_base_patch16_224": "vit_small_patch16_224",
    "vit_large_patch16_224": "vit_base_patch16_224",
}


@contextmanager
def slices() -> Iterator[None]:
    """Inside, parts of parameters are autograd's own slices."""
    with substituted.object(shared_parameters, "accumulates_slices", lambda owner: False):
        yield


@dataclass(frozen=True)
class Variant:
    """One variant: its models, and what they run under."""

    models: nn.ModuleList  # teacher, student
    inside: Callable[[], AbstractContextManager[object]] = nullcontext

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Both forwards, SLAD's loss, one backward; gradients are dropped first."""
        self.models.zero_grad(set_to_none=True)
        with self.inside():
            teacher, student = (model(images).float() for model in self.models)
            slad_losses(Logits(student, teacher), labels).total.backward()

    def gradients(self) -> dict[str, Tensor]:
        """Of the teacher's adapters."""
        named = self.models[0].named_parameters()
        return {name: p.grad for name, p in named if p.grad is not None}


def variants(shape: ModelShape, rank: int, device: str, dtype: torch.dtype) -> dict[str, Variant]:
    """By name; all from the same weights."""
    from fused_lora.bench.suites.train_step import build  # registering suites imports this file

    names = shape.name, STUDENTS[shape.name]
    pair = nn.ModuleList(build(name, device, dtype, seed) for seed, name in enumerate(names))
    fused_lora.patch(pair[0], rank, targets=["q", "k", "v"], seed=0)
    _wake(pair[0])
    fused_lora.share_adapters(*pair)
    apart = copy.deepcopy(pair)
    fused_lora.unshare_adapters(apart[1])
    _forget_sharers(apart[0])
    return {"apart": Variant(apart), "slices": Variant(pair, slices), "shared": Variant(pair)}


def _wake(model: nn.Module) -> None:
    for module in model.modules():
        for _, b in module.adapters() if isinstance(module, AdaptedLinear) else ():
            nn.init.normal_(b, std=0.02)


def _forget_sharers(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            module._has_sharers = False


class Launches(TorchDispatchMode):
    """Counts the operations that write memory, and the bytes they write."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.nbytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run ``func``; count it unless all it made are views."""
        held = {t.untyped_storage().data_ptr() for t in _tensors((*args, *(kwargs or {}).values()))}
        out = func(*args, **(kwargs or {}))
        mutates = func._schema.is_mutable
        written = [
            t for t in _tensors([out]) if mutates or t.untyped_storage().data_ptr() not in held
        ]
        self.count += bool(written)
        self.nbytes += sum(t.nbytes for t in written)
        return out


def _tensors(values: Iterable[object]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


HEADS = ("variant", "launches", "beyond apart", "MB written", "beyond apart", "ms", "x apart")
CLOSE = {"fp32": 1e-5, "bf16": 2e-2}  # relative: both sum the same terms, in two orders at most


@job(SUITE)
def run(options: argparse.Namespace, grid: Grid) -> int:
    """The whole grid; 1 where sharing and slices disagree."""
    origin, wrong = provenance(options.device), 0
    grids = list(product(grid.models, grid.batches, grid.ranks, grid.dtypes))
    for model, batch, rank, dtype in grids:
        if model not in STUDENTS or dtype not in CLOSE:
            print(f"passed over: {model} in {dtype}", file=sys.stderr)
            continue
        case = SharingCase(SUITE, model, STUDENTS[model], batch, rank, dtype)
        rows = measured(case, options.device, grid.budget_s / len(grids), origin)
        wrong += not rows
        if not rows:
            print(f"refused: shared and slices disagree ({case})", file=sys.stderr)
            continue
        print(text(case, rows))
        if options.rows:
            append(rows, options.rows)
    return 1 if wrong else 0


def measured(
    case: SharingCase, device: str, budget_s: float, origin: Provenance
) -> list[SharingRow]:
    """A row for each variant; none where the gradients differ."""
    found = variants(SHAPES[case.teacher], case.rank, device, STORED[case.dtype])
    generator = torch.Generator().manual_seed(1)
    size = found["apart"].models[0].get_submodule("patch_embed").img_size
    images = torch.randn(case.batch, 3, *size, generator=generator)  # type: ignore[misc]
    images = images.to(device, STORED[case.dtype])
    labels = torch.randint(1000, (case.batch,), generator=generator).to(device)
    steps = {name: partial(variant.step, images, labels) for name, variant in found.items()}
    if not agree(found, steps, CLOSE[case.dtype]):
        return []
    counts = {}
    for name, step in steps.items():
        with Launches() as counts[name]:
            step()
    times = interleave(steps, clock_for(device), budget_s, warmup=1)
    return [
        SharingRow(
            case,
            name,
            counts[name].count,
            counts[name].nbytes,
            len(times[name].samples_ms),
            times[name].median_ms,
            times[name].over(times["apart"]),
            origin,
        )
        for name in steps
    ]


def agree(
    found: dict[str, Variant], steps: Mapping[str, Callable[[], object]], close: float
) -> bool:
    """Whether both variants of sharing give the teacher's adapters the same gradients."""
    grads = []
    for name in ("slices", "shared"):
        steps[name]()
        grads.append({key: grad.clone() for key, grad in found[name].gradients().items()})
    same = grads[0].keys() == grads[1].keys()
    return same and all(error(grads[1][key], grad) <= close for key, grad in grads[0].items())


def text(case: SharingCase, rows: Sequence[SharingRow]) -> str:
    """One aligned table."""
    base = rows[0]
    body = [
        (
            row.variant,
            str(row.launches),
            f"{row.launches - base.launches:+d}",
            f"{row.written_bytes / 1e6:.1f}",
            f"{(row.written_bytes - base.written_bytes) / 1e6:+.2f}",
            milliseconds(row.median_ms),
            f"{row.ratio_apart:.3f}",
        )
        for row in rows
    ]
    return "\n".join([f"{case.suite}: {case}", *aligned([HEADS, *body]), ""])
