"""lora_merge: the tile code on the CPU and, where there is one, the kernel on a GPU."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from fused_lora.kernels.cuda import lora_merge as cuda
from fused_lora.kernels.cuda import native

from .cases import BF16, CASES, F16, F32, build, expected, gaps

DTYPES = [
    pytest.param(dtypes, id="-".join(str(dtype).removeprefix("torch.") for dtype in dtypes))
    for dtypes in [
        (F32, F32, F32),
        (BF16, BF16, F32),
        (F16, F16, F16),
        (F32, BF16, BF16),
        (F32, F16, F32),
    ]
]
SEED, STEP = 2**40 + 3, 12345


@pytest.fixture
def on_host(host: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The launcher uses the module whose kernels run on the CPU."""
    monkeypatch.setattr(native, "load", lambda: host)
    return host


def run_host(host: ModuleType, merges: list[cuda.CompiledMerge], rounding: str) -> None:
    table = cuda.pack(merges)
    host.lora_merge(
        table=table.table.data_ptr(), count=len(table.merges), tiles=table.tiles,
        types=table.types, rounding=getattr(host.Rounding, rounding), seed=SEED, step=STEP,
        device=0, stream=0,
    )  # fmt: skip


def roundings(out: torch.dtype) -> list[str]:
    return ["nearest"] if out == F32 else ["nearest", "stochastic"]


@pytest.mark.parametrize("dtypes", DTYPES)
def test_tile_code_equals_reference(on_host: ModuleType, dtypes: tuple[torch.dtype, ...]) -> None:
    for rounding in roundings(dtypes[1]):
        torch.manual_seed(0)
        merges = [build(case, *dtypes) for case in CASES]
        wanted = [expected(merge, rounding, SEED, STEP) for merge in merges]
        run_host(on_host, merges, rounding)
        for case, merge, want in zip(CASES, merges, wanted, strict=True):
            assert torch.equal(merge.out, want), f"{rounding}: {case.why}"
            assert gaps(merge.out).isnan().all(), f"{rounding}: {case.why}: wrote between rows"


def test_tile_code_on_ordinary_numbers(on_host: ModuleType) -> None:
    """Each result is one fp32 rounding of each of R products away from float64."""
    torch.manual_seed(0)
    w, a, b = torch.randn(100, 200), torch.randn(300, 200), torch.randn(100, 300)
    merge = cuda.CompiledMerge(w, torch.empty_like(w), a, b, 0.1)
    wanted = w.double() + 0.1 * (b.double() @ a.double())
    run_host(on_host, [merge], "nearest")
    budget = 300 * 2**-24 * (w.abs() + 0.1 * (b.abs() @ a.abs()))
    assert ((merge.out - wanted).abs() <= budget).all()


def test_every_tile_is_found_once(on_host: ModuleType) -> None:
    """Items of 1 to 9 tiles: the blocks visit each item's tiles in order, none twice."""
    sizes = [(1, 1), (64, 128), (65, 128), (64, 129), (190, 300), (1, 385), (129, 1)]
    merges = [
        cuda.CompiledMerge(w, w, w[:0], w[:, :0]) for w in (torch.ones(size) for size in sizes)
    ]
    table = cuda.pack(merges)
    got = torch.empty(table.tiles, 3, dtype=torch.int64)
    ctypes.CDLL(on_host.__file__).host_tiles(
        ctypes.c_void_p(table.table.data_ptr()), len(merges), ctypes.c_int64(table.tiles),
        ctypes.c_void_p(got.data_ptr()),
    )  # fmt: skip
    wanted = [
        [index, row, column]
        for index, (n, k) in enumerate(sizes)
        for row in range(0, n, 64)
        for column in range(0, k, 128)
    ]
    assert got.tolist() == wanted


def test_a_table_is_built_once(on_host: ModuleType) -> None:
    """The same tensors are launched from the same table, others from their own."""
    w, a, b = torch.ones(2, 4, 6), torch.ones(2, 6), torch.ones(4, 2)
    tables = [cuda.pack([cuda.CompiledMerge(w[i], w[i], a, b, s)]).table for i, s in
              ((0, 0.5), (0, 0.5), (1, 0.5), (0, 0.25))]  # fmt: skip
    addresses = [table.data_ptr() for table in tables]
    assert addresses[0] == addresses[1] and len(set(addresses)) == 3


def test_nothing_to_do_needs_no_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load", lambda: pytest.fail("the module was asked for"))
    cuda.lora_merge([], [], [], [], [])
    empty = torch.ones(0, 4)
    cuda.lora_merge([empty], [empty], [torch.ones(2, 4)], [torch.ones(0, 2)], [1.0])


def test_refusals(on_host: ModuleType) -> None:
    w, a, b = torch.ones(4, 6), torch.ones(2, 6), torch.ones(4, 2)
    good = cuda.CompiledMerge(w, w, a, b)
    bad = {
        "do not fit": [replace(good, b=b[:3])],
        "contiguous": [replace(good, w=torch.ones(6, 4).T)],
        "the first is": [good, replace(good, w=w.half())],
        "b is torch.float16": [replace(good, b=b.half())],
        "got float64": [replace(good, w=w.double(), out=w.double())],
        "rows of out overlap": [replace(good, out=torch.ones(9).as_strided((4, 6), (1, 1)))],
        "offset must not be negative": [replace(good, offset=-1)],
    }
    for message, merges in bad.items():
        with pytest.raises(ValueError, match=message):
            cuda.pack(merges)
    with pytest.raises(ValueError, match="nothing to round"):
        run_host(on_host, [good], "stochastic")
    with pytest.raises(ValueError, match="dtype"):
        run_host(on_host, [replace(good, w=w.half())], "nearest")
    with pytest.raises(ValueError, match="upwards"):
        cuda.launch(cuda.pack([good]), "upwards")


def test_launch_errors_are_exceptions(on_host: ModuleType) -> None:
    w = torch.ones(4, 6)
    table = cuda.pack([cuda.CompiledMerge(w, w, w[:0], w[:, :0])])
    with pytest.raises(RuntimeError, match="lora_merge: invalid device ordinal"):
        on_host.lora_merge(
            table=0, count=1, tiles=table.tiles, types=table.types,
            rounding=on_host.Rounding.nearest, seed=0, step=0, device=-1, stream=0,
        )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtypes", DTYPES)
def test_kernel_equals_reference(dtypes: tuple[torch.dtype, ...]) -> None:
    if reason := native.why_not():
        pytest.skip(reason)
    for rounding in roundings(dtypes[1]):
        torch.manual_seed(0)
        on_cpu = [build(case, *dtypes) for case in CASES]
        wanted = [expected(merge, rounding, SEED, STEP) for merge in on_cpu]
        merges = [_to_device(merge) for merge in on_cpu]
        columns = zip(*((m.w, m.out, m.a, m.b, m.scale, m.offset) for m in merges), strict=True)
        w, out, a, b, scales, offsets = columns
        cuda.lora_merge(w, out, a, b, scales, rounding, SEED, STEP, offsets)
        for case, merge, want in zip(CASES, merges, wanted, strict=True):
            assert torch.equal(merge.out.cpu(), want), f"{rounding}: {case.why}"
            assert gaps(merge.out).isnan().all(), f"{rounding}: {case.why}: wrote between rows"


def _to_device(merge: cuda.CompiledMerge) -> cuda.CompiledMerge:
    """The same strides, offsets and gaps on the GPU."""

    def move(tensor: torch.Tensor) -> torch.Tensor:
        whole = tensor.untyped_storage().cuda()
        empty = torch.empty(0, dtype=tensor.dtype, device="cuda")
        return empty.set_(whole, tensor.storage_offset(), tensor.shape, tensor.stride())

    w = move(merge.w)
    out = w if merge.out is merge.w else move(merge.out)
    return replace(merge, w=w, out=out, a=move(merge.a), b=move(merge.b))
