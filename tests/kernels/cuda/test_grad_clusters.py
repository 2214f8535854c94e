"""Clusters of slices of rows: how many a plan has, and that they add their sums on chip."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from fused_lora.kernels.cuda import native
from fused_lora.kernels.cuda.lora_grad_shape import GradCall, GradShape
from fused_lora.kernels.cuda.native import Chip
from fused_lora.testing.yardstick import error
from fused_lora.types import Span

from .grad_cases import BF16, F16, F32, Case, Problem, one
from .test_lora_grad import (
    ALL,
    SMALL,
    check,
    flat,
    on_host,  # noqa: F401
    run,
    world,
)

# K, N, ranks, architecture; blocks that hold what one cannot, slices on 132 processors and how many
# of them are in a cluster.
CLUSTERS = [
    (768, 768, 16, 90, 1, 124, 4), (768, 3072, 16, 90, 2, 62, 2), (384, 1152, 48, 90, 2, 62, 2),
    (768, 2304, 48, 90, 4, 30, 2), (1024, 1024, 64, 90, 4, 30, 2), (4096, 8192, 16, 90, 8, 15, 1),
    (4096, 4096, 16, 100, 4, 31, 1), (384, 384, 16, 100, 1, 132, 2), (768, 768, 16, 120, 2, 66, 1),
    (768, 768, 16, 80, 1, 132, 1), (384, 384, 16, 89, 1, 132, 1),
]  # fmt: skip


@pytest.mark.parametrize("k, n, ranks, arch, blocks, slices, together", CLUSTERS)
def test_clusters(
    on_host: ModuleType,  # noqa: F811
    k: int,
    n: int,
    ranks: int,
    arch: int,
    blocks: int,
    slices: int,
    together: int,
) -> None:
    """As many as run at once, and most processors busy."""
    plan = GradShape(k, n, ranks).plan(10**6, Chip(arch, 132))
    assert (plan.chunks, plan.slices, plan.cluster_slices) == (blocks, slices, together)
    assert plan.partials == slices // together
    assert plan.partial_floats % plan.partials == 0


def test_slices_of_given_h_and_dh_are_in_clusters_too(on_host: ModuleType) -> None:  # noqa: F811
    """Of two blocks a processor, a pair of processors has four; of one, two."""
    wanted = {  # K, N, ranks, architecture: chunks, slices, of a cluster
        (384, 384, 16, 90): (1, 248, 8),
        (768, 768, 16, 90): (2, 132, 4),
        (768, 1536, 16, 90): (3, 88, 4),
        (768, 384, 60, 90): (3, 44, 2),
        (768, 384, 60, 120): (3, 44, 1),  # whose shared memory holds no sums of so many ranks
    }
    for (k, n, ranks, arch), found in wanted.items():
        shape = GradShape(k, n, ranks, h_given=True, dh_given=True)
        plan = shape.plan(10**6, Chip(arch, 132))
        assert (plan.chunks, plan.slices, plan.cluster_slices) == found


# Clusters of four and of eight that the chip has said it runs at once: two groups short of 16
# processors, one, none; a larger chip; four processors of one; parts of a chip with no group of
# eight, and of four.
@pytest.mark.parametrize(
    "counts, processors, arch, slices, together",
    [((30, 14), 132, 90, 132, 2), ((31, 15), 132, 90, 124, 4), ((32, 16), 132, 90, 128, 8),
     ((36, 18), 148, 100, 144, 8), ((34, 16), 148, 100, 148, 2), ((31, 15), 4, 90, 4, 4),
     ((4, 0), 16, 90, 16, 4), ((0, 0), 6, 100, 6, 2)],
)  # fmt: skip
def test_as_many_clusters_as_the_chip_runs_at_once(
    on_host: ModuleType,  # noqa: F811
    counts: tuple[int, int],
    processors: int,
    arch: int,
    slices: int,
    together: int,
) -> None:
    plan = GradShape(384, 384, 16).plan(10**6, Chip(arch, processors, *counts))
    assert (plan.chunks, plan.slices, plan.cluster_slices) == (1, slices, together)


def test_a_chip_is_asked_once_and_only_where_it_has_clusters(
    on_host: ModuleType,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []

    def counts(index: int) -> tuple[int, int]:
        asked.append(index)
        return 31, 15

    known = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: known)
    monkeypatch.setattr(native, "load", lambda: SimpleNamespace(clusters_at_once=counts))
    monkeypatch.setattr(native, "why_not", lambda device=None: None)
    device = torch.device("cuda", 7)
    Chip.of.cache_clear()
    try:
        assert Chip.of(device) == Chip.of(device) == Chip(90, 132, 31, 15)
        assert asked == [7]
        known.major = 8
        Chip.of.cache_clear()
        assert Chip.of(device) == Chip(80, 132) and asked == [7]
        known.major = 9
        monkeypatch.setattr(native, "why_not", lambda device=None: "not built")
        Chip.of.cache_clear()
        assert Chip.of(device) == Chip(90, 132) and asked == [7]
    finally:
        Chip.of.cache_clear()


@pytest.mark.parametrize(
    "tiles, slices, together",
    [(0, 1, 1), (1, 1, 1), (2, 2, 2), (3, 4, 2), (6, 8, 4), (13, 16, 8), (100, 104, 8)],
)
def test_few_rows_fill_no_cluster(
    on_host: ModuleType,  # noqa: F811
    tiles: int,
    slices: int,
    together: int,
) -> None:
    """No more slices of a cluster than tiles; the last slices of a cluster may have none."""
    plan = GradShape(768, 768, 16).plan(16 * tiles, Chip(90, 132))
    assert (plan.slices, plan.cluster_slices) == (slices, together)


@dataclass(frozen=True)
class InClusters:
    """A problem on so many processors: slices of a cluster, and how many of them are written."""

    case: Case
    processors: int
    together: int
    partials: int


THREE = tuple(Span(384 * g, 384 * g + 384, 16) for g in range(3))
OF_SLICES = [
    InClusters(Case("fewer tiles than slices, two without rows", 81, 72, 40, SMALL.spans), 8, 4, 2),
    InClusters(Case("eight in one cluster, a tail", 197, 136, 72, one(72, 5), F16), 8, 8, 1),
    InClusters(Case("two clusters of eight", 257, 72, 40, one(40, 16)), 16, 8, 2),
    InClusters(Case("four chunks of two slices", 41, 1024, 1024, one(1024, 60)), 8, 2, 1),
    InClusters(Case("three adapters, two chunks of four slices, some a tile more", 90, 384, 1152,
                    THREE), 8, 4, 1),
    InClusters(Case("chunks that are no cluster, two blocks a processor", 90, 768, 1536,
                    one(1536, 12), given="h dh"), 6, 4, 1),
    InClusters(Case("given, 64 ranks: more than the tiles take", 70, 72, 136, one(136, 60),
                    given="h dh"), 4, 4, 1),
    InClusters(Case("pairs of another architecture", 70, 136, 72, one(72, 16), arch=100), 4, 2, 2),
    InClusters(Case("TF32", 45, 72, 40, SMALL.spans, F32), 4, 4, 1),
    InClusters(Case("TF32, two chunks of two slices", 20, 384, 1536, one(1536, 4), F32), 4, 2, 1),
    InClusters(Case("TF32, given", 45, 132, 68, one(68, 40), F32, given="h dh"), 4, 4, 1),
]  # fmt: skip


@pytest.mark.parametrize("of", OF_SLICES, ids=[of.case.why for of in OF_SLICES])
def test_a_cluster_of_slices_adds_its_sums(on_host: ModuleType, of: InClusters) -> None:  # noqa: F811
    """dbias and dh as well; to the bit the same in every world."""
    case, p, written = of.case, Problem(of.case), "dh" not in of.case.given
    plan = GradCall(p.x, p.dy, p.adapters, ALL, **both(p)).plan(Chip(case.arch, of.processors))
    assert (plan.cluster_slices, plan.partials) == (of.together, of.partials)
    found = []
    for backwards, late, bulk in product((False, True), repeat=3):
        world(on_host, backwards, late, bulk)
        dh = torch.empty_like(p.dh) if written else None
        ours = run(p, ALL, of.processors, dh_out=dh)
        assert dh is None or torch.equal(dh, p.dh)
        found.append(flat(ours))
    check(ours, p.expected(ALL))
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in other)


def both(p: Problem) -> dict[str, Tensor | None]:
    """h and dh, None where they are formed."""
    return {"h": None, "dh": None, **p.given}


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("given", ["", "h dh"])
def test_clusters_add_what_a_second_launch_would(
    on_host: ModuleType,  # noqa: F811
    dtype: torch.dtype,
    given: str,
) -> None:
    """Of ordinary numbers: the same slices, added in another order, differ as fp32 sums do."""
    p = Problem(Case("", 197, 72, 40, SMALL.spans, dtype, given=given))
    p.x, p.dy = (torch.randn(t.shape).to(dtype) for t in (p.x, p.dy))
    alone = Problem(replace(p.case, arch=80))
    alone.x, alone.dy, alone.h, alone.dh = p.x, p.dy, p.h, p.dh
    one_by_one, together = (flat(run(each, ALL, processors=8)) for each in (alone, p))
    for name, value in together.items():
        if not (name == "bias" and dtype is BF16):
            assert 0 <= error(value, one_by_one[name]) < 1e-6
