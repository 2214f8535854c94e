"""add_slices: partial sums of any kernel added up, several passes in one launch of a program."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fused_lora.kernels.cuda import lora_grad as cuda
from fused_lora.kernels.cuda import native
from fused_lora.kernels.cuda.lora_grad import GradSums, add_slices
from fused_lora.kernels.cuda.native import Chip
from fused_lora.kernels.interface import Adapters, Grads
from fused_lora.programs.describe import ALLOCATIONS, is_view, launches, name_of, work
from fused_lora.programs.program import InputSpec, build
from fused_lora.types import Needs, Span
from tests.programs.test_record import Op

from .grad_cases import BF16, F16, F32, few_bits, one
from .test_lora_grad import world

CHIP = Chip(80, 2)


@dataclass(frozen=True)
class Case:
    """Sums of one pass, and why they are here."""

    why: str
    slices: int
    k: int
    n: int
    spans: tuple[Span, ...]
    rank_blocks: int = 1
    dtype: torch.dtype = F32
    bias: torch.dtype | None = None
    add: bool = False
    left_out: tuple[str, ...] = ()  # of a0, a1, ..., b0, ...


CASES = [
    Case("one adapter", 3, 32, 48, one(48, 16)),
    Case("more slices than warps, columns that are no whole 16", 19, 40, 24, one(24, 5)),
    Case("bf16, dbias beside it", 4, 24, 40, one(40, 12), bias=BF16, dtype=BF16),
    Case("dbias in the second block of ranks", 2, 16, 24, one(24, 16), 2, F16, F32),
    Case("qkv", 5, 24, 72, tuple(Span(24 * g, 24 * g + 24, 8) for g in range(3)), 2, bias=F16),
    Case("four, out of order, with gaps", 2, 8, 64,
         (Span(40, 56, 3), Span(0, 8, 5), Span(9, 10, 1), Span(20, 33, 7)), dtype=BF16),
    Case("added to what is there", 3, 24, 40, one(40, 12), bias=F32, add=True),
    Case("added in 16 bits", 9, 24, 40, one(40, 12), dtype=F16, add=True),
    Case("x alone", 3, 40, 0, one(24, 6), left_out=("b0",)),
    Case("dy alone", 3, 0, 40, one(40, 6), bias=BF16, left_out=("a0",)),
    Case("dbias alone", 3, 0, 40, one(40, 6), bias=BF16, left_out=("a0", "b0")),
    Case("some of two", 3, 24, 40, (Span(0, 16, 3), Span(16, 40, 4)), left_out=("a1", "b0")),
    Case("more blocks of ranks than ranks", 2, 24, 40, one(40, 3), 4),
    Case("no slice", 0, 24, 40, one(40, 12), bias=BF16),
    Case("no slice, added to what is there", 0, 24, 40, one(40, 12), add=True),
]  # fmt: skip


@pytest.fixture
def on_host(host: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The launcher uses the module whose kernels run on the CPU."""
    monkeypatch.setattr(native, "load", lambda: host)
    yield host
    world(host, False, False)


class Sums:
    """The partial sums of ``case`` and where they go: blocks of larger tensors, a transposed."""

    def __init__(self, case: Case, exact: bool = True, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.case, ranks = case, [span.rank for span in case.spans]
        self.firsts = list(accumulate(ranks, initial=0))
        self.wide = -(-case.k // 16) * 16
        size = (case.slices, self.wide + -(-case.n // 16) * 16, 16 * case.rank_blocks)
        values = few_bits(*size) if exact else torch.randn(size)
        self.partial = values.clone()
        self.partial[:, case.k : self.wide] = torch.nan  # what nothing reads
        self.partial[:, self.wide + case.n :] = torch.nan
        self.partial[:, : self.wide, self.firsts[-1] :] = torch.nan
        self.partial[:, self.wide :, self.firsts[-1] + (case.bias is not None) :] = torch.nan
        scales = [0.5 * (g + 1) for g in range(len(ranks))]
        a = [torch.empty(r, case.k) for r in ranks]
        b = [torch.empty(span.width, span.rank) for span in case.spans]
        self.adapters = Adapters(a, b, scales, case.spans)
        self.owners: list[Tensor] = []

    def outputs(self) -> Grads:
        """Few bits in each of them, and around them."""
        case, self.owners = self.case, []
        torch.manual_seed(7)

        def inside(name: str, rows: int, columns: int) -> Tensor | None:
            if name in case.left_out:
                return None
            self.owners.append(few_bits(columns + 4, rows + 3).to(case.dtype))
            return self.owners[-1][1 : columns + 1, 2 : rows + 2].T

        a = [inside(f"a{g}", span.rank, case.k) for g, span in enumerate(case.spans)]
        b = [inside(f"b{g}", span.width, span.rank) for g, span in enumerate(case.spans)]
        bias = None if case.bias is None else few_bits(case.n).to(case.bias)
        return Grads(None, None, bias, a, b)

    def expected(self) -> Grads:
        """Likewise, by sums in float64 rounded once."""
        case, grads = self.case, self.outputs()
        total = self.partial.double().sum(0)
        of_x, of_dy = total[: case.k], total[self.wide : self.wide + case.n]
        for g, span in enumerate(case.spans):
            ranks = slice(self.firsts[g], self.firsts[g] + span.rank)
            db = self.adapters.scales[g] * of_dy[span.start : span.stop, ranks]
            for grad, value in ((grads.a[g], of_x[:, ranks].T), (grads.b[g], db)):
                if grad is not None:
                    grad.copy_((value + grad.double() * case.add).to(case.dtype))
        if grads.bias is not None:
            grads.bias.copy_(of_dy[:, self.adapters.rank])
        return grads

    def of(self, grads: Grads) -> cuda.Sums:
        """As the interface has it."""
        case = self.case
        return cuda.Sums(self.partial, case.k, case.n, self.adapters, grads, case.add)


def written(grads: Grads) -> list[Tensor]:
    return [grad for grad in (grads.bias, *grads.a, *grads.b) if grad is not None]


IDS = [case.why for case in CASES]


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_sums_equal_float64_and_nothing_beside_them_is_written(
    on_host: ModuleType, case: Case
) -> None:
    """To the bit: of few bits every sum is exact, and what is exact is rounded once."""
    sums = Sums(case)
    wanted = written(sums.expected())
    around = sums.owners
    ours = sums.outputs()
    world(on_host, backwards=True, late=False)
    add_slices(*sums.of(ours))
    assert len(written(ours)) == len(wanted)
    for mine, other in zip([*written(ours), *sums.owners], [*wanted, *around], strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_several_passes_in_one_launch_are_those_of_one_each_to_the_bit(
    on_host: ModuleType, count: int
) -> None:
    """Other sizes, dtypes and numbers of adapters side by side, in any order."""
    for start in range(0, len(CASES), count):
        every = [Sums(case, exact=False) for case in (CASES * 2)[start : start + count]]
        alone = [sums.outputs() for sums in every]
        for sums, grads in zip(every, alone, strict=True):
            add_slices(*sums.of(grads))
        together = [sums.outputs() for sums in every]
        given = [sums.of(grads) for sums, grads in zip(every, together, strict=True)]
        first, *others = map(GradSums.of, given)
        whole = first.joined(others) if others else first
        assert whole is not None
        world(on_host, backwards=start % 2 == 0, late=False)
        whole(tuple(t for each in given for t in each.tensors))
        for one_launch, launch_each in zip(together, alone, strict=True):
            pairs = zip(written(one_launch), written(launch_each), strict=True)
            assert all(torch.equal(*pair) for pair in pairs)


def test_a_seventh_is_a_launch_of_its_own(on_host: ModuleType) -> None:
    sums = Sums(CASES[0])
    pieces = [GradSums.of(sums.of(sums.outputs())) for _ in range(7)]
    assert pieces[0].joined(pieces[1:6]) is not None
    assert pieces[0].joined(pieces[1:]) is None
    with pytest.raises(ValueError, match="serves 1 to 6 pieces, got 7"):
        on_host.BoundSums([each for one in pieces for each in one.pieces])
    with pytest.raises(ValueError, match="serves 1 to 6 pieces, got 0"):
        on_host.BoundSums([])


def test_what_cannot_be_added_up_is_said(on_host: ModuleType) -> None:
    sums = Sums(replace(CASES[6], spans=(Span(0, 16, 5), Span(16, 40, 6))))
    p, (k, n), own = sums.partial, (24, 40), sums.adapters
    good = sums.outputs()
    (da, *more_a), (db, *more_b) = good.a, good.b
    many = Adapters(*(list(each)[:1] * 5 for each in own))
    bad = [
        ("5 adapters share these sums; 1 to 4", (p, k, n, many, good)),
        ("0 adapters share", (p, k, n, Adapters([], [], [], ()), good)),
        (r"2 adapters have \[2, 1, 2\]", (p, k, n, own, good._replace(a=[da]))),
        ("k -8, n 40", (p, -8, n, own, good)),
        (r"for 8 columns of x and 40 of dy, got torch.float32 \(3, 80, 16\)", (p, 8, n, own, good)),
        (r"float32 \[slices, 80, a multiple of 16 from 12 on\]", (p.half(), k, n, own, good)),
        (r"got torch.float32 \(3, 80, 8\)", (p[..., :8], k, n, own, good)),
        (r"got torch.float32 \(80, 16\)", (p[0], k, n, own, good)),
        (r"contiguous, got strides \(2560,", (p.repeat(1, 1, 2)[..., ::2], k, n, own, good)),
        (r"da 0 must be \(5, 24\) on cpu, got \(24, 5\)",
         (p, k, n, own, good._replace(a=[da.T, *more_a]))),
        (r"db 0 must be \(16, 5\) on cpu, got \(16, 5\) on meta",
         (p, k, n, own, good._replace(b=[db.to("meta"), *more_b]))),
        ("db 1 is of columns 16 to 40 of dy, which has 39", (p, k, 39, own, good)),
        (r"dbias must be \(40,\)", (p, k, n, own, good._replace(bias=torch.zeros(3)))),
        (r"dbias must be contiguous, got strides \(2,\)",
         (p, k, n, own, good._replace(bias=torch.zeros(80)[::2]))),
        ("dbias must be one of .*, got torch.int32",
         (p, k, n, own, good._replace(bias=torch.zeros(40, dtype=torch.int32)))),
        ("one dtype of .*, got torch.float16, torch.float32",
         (p, k, n, own, good._replace(a=[da.half(), *more_a]))),
        ("got torch.float64", (p, k, n, own, good._replace(
            a=[t.double() for t in good.a], b=[t.double() for t in good.b]))),
    ]  # fmt: skip
    held = [t.clone() for t in written(good)]
    for message, given in bad:
        with pytest.raises(ValueError, match=f"add_slices: .*{message}"):
            add_slices(*given)
    assert all(torch.equal(*pair) for pair in zip(written(good), held, strict=True))
    add_slices(p, k, n, own, good)


def test_the_module_refuses_what_would_read_out_of_place(on_host: ModuleType) -> None:
    place = dict(first_column=0, columns=40, first_rank=0, rank=12, scale=1.0)
    strides = dict(da_strides=(24, 1), db_strides=(12, 1))
    sizes = dict(slices=1, k=24, n=40, rank_blocks=1)
    types = dict(grad=on_host.DType.float32, dbias_type=on_host.DType.float32, add=False)
    group = on_host.SumGroup(**place, **strides)

    def launch(at: list[int], change: dict, **where: int) -> None:
        groups = [on_host.SumGroup(**(place | where), **strides)]
        piece = on_host.SumPiece(**(sizes | types | dict(groups=groups) | change))
        on_host.BoundSums([piece])(at, 0, 0)

    bad = {
        "1 pieces have 4 addresses, got 3": ([0] * 3, {}),
        "serves 1 to 4 groups, got 5": ([0] * 4, dict(groups=[group] * 5)),
        "serves 1 to 4 groups, got 0": ([0] * 2, dict(groups=[])),
        "sizes are negative: k 24, n -1": ([0] * 4, dict(n=-1)),
        "0 ranks of a partial cannot hold 12": ([0] * 4, dict(rank_blocks=0)),
        "group 1 has columns or ranks out of place": (
            [0] * 6,
            dict(groups=[group] * 2, rank_blocks=2),
        ),
    }
    for message, (at, change) in bad.items():
        with pytest.raises(ValueError, match=message):
            launch(at, change)
    with pytest.raises(ValueError, match="16 ranks of a partial cannot hold 17"):
        launch([0, 8, 0, 0], {}, rank=16)  # and dbias
    with pytest.raises(ValueError, match="columns 8 and 40 more of 40"):
        launch([0, 0, 0, 8], {}, first_column=8)
    with pytest.raises(ValueError, match="slice has 4294967296 elements"):
        launch([0] * 4, dict(k=2**24, n=0, rank_blocks=16))
    with pytest.raises(RuntimeError):
        piece = on_host.SumPiece(**sizes, **types, groups=[group])
        on_host.BoundSums([piece])([0] * 4, -1, 0)  # a device that is not there


M, K, N, RANK = 37, 40, 24, 6
SPANS = one(N, RANK)


def gradients(count: int, between=lambda grads, x: None) -> Op:
    """da, db and dbias of ``count`` passes over one x and dy each, with ``between`` after each."""

    def ahead(x, *rest):
        made = []
        for i in range(count):
            dy, a, b = rest[3 * i : 3 * i + 3]
            own = Adapters([a], [b], [0.5 + i], SPANS)
            found = cuda.lora_grads(x, dy, own, Needs(False, bias=True), chip=CHIP)
            made += [*written(found)]
            if (more := between(found, x)) is not None:
                made.append(more)
        return tuple(made), ((), None)

    return Op(ahead)


def operands(count: int, rows: int = M) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(rows, N), (RANK, K), (N, RANK)]
    dtypes = [BF16, F32, F32]
    found = [torch.randn(rows, K).to(BF16)]
    for _ in range(count):
        found += [torch.randn(s).to(t) for s, t in zip(shapes, dtypes, strict=True)]
    return found


def of_program(operation: Op, tensors: list[Tensor]) -> list[str]:
    """The names of a program's launches; what it gives is what the operation does as written."""
    program = build(operation, [InputSpec.of(t, False) for t in tensors])
    ours, plain = program.forward(*tensors), operation.ahead(*tensors)[0]
    assert len(ours) == len(plain)
    assert all(torch.equal(*pair) for pair in zip(ours, plain, strict=True))
    made = [call for call in program.calls if not is_view(call)]
    names = [name_of(call) for call in made if name_of(call) not in ALLOCATIONS]
    assert launches(program.calls) == len(names)
    return names


PASS, SUM = "lora_grad", "add_partials"


@pytest.mark.parametrize("rows", [M, 0])
@pytest.mark.parametrize("count", [1, 2, 6, 7])
def test_a_program_adds_the_slices_of_all_passes_in_one_launch(
    on_host: ModuleType, count: int, rows: int
) -> None:
    names = of_program(gradients(count), operands(count, rows))
    assert names == [PASS] * min(count, 6) + [SUM] + [PASS, SUM] * (count > 6)


def test_sums_wait_for_no_reader(on_host: ModuleType) -> None:
    reads = of_program(gradients(3, lambda grads, x: grads.a[0].exp()), operands(3))
    assert reads == [PASS, SUM, "exp"] * 3
    other = of_program(gradients(3, lambda grads, x: x.exp()), operands(3))
    assert other == [PASS, "exp"] * 2 + [PASS, SUM, "exp"]
    views = of_program(gradients(2, lambda grads, x: grads.a[0].t()), operands(2))
    assert views == [PASS, PASS, SUM]


def test_a_program_counts_what_is_moved_as_before_the_two_were_two(on_host: ModuleType) -> None:
    tensors = operands(1)
    program = build(gradients(1), [InputSpec.of(t, False) for t in tensors])
    (partial,) = (call.outs[0] for call in program.calls if len(call.outs) and call.outs[0].nbytes
                  and len(call.outs[0].shape) == 3)  # fmt: skip
    assert partial.shape[1:] == (48 + 32, 16) and partial.dtype is F32
    of = {name_of(call): work(call).nbytes for call in program.calls}
    read = sum(t.nbytes for t in tensors)
    assert of[PASS] == read + partial.nbytes
    assert of[SUM] == partial.nbytes + sum(t.nbytes for t in tensors[2:]) + 2 * N


@pytest.mark.gpu
def test_sums_on_a_gpu() -> None:
    """Alone and six in one launch, those of float64."""
    if reason := native.why_not():
        pytest.skip(reason)
    for start in range(0, len(CASES), 6):
        every = [Sums(case) for case in CASES[start : start + 6]]
        truth = [written(sums.expected()) for sums in every]
        for together in (False, True):
            given = [on_gpu(sums) for sums in every]
            launches_of = [GradSums.of(each) for each in given]
            if together:
                first, *others = launches_of
                whole = first.joined(others)
                assert whole is not None
                whole(tuple(t for each in given for t in each.tensors))
            else:
                for launch, each in zip(launches_of, given, strict=True):
                    launch(each.tensors)
            for each, wanted in zip(given, truth, strict=True):
                pairs = zip(written(each.grads), wanted, strict=True)
                assert all(torch.equal(ours.cpu(), other) for ours, other in pairs)


def on_gpu(sums: Sums) -> cuda.Sums:
    """Its tensors there, with the strides they have here."""
    given = sums.of(sums.outputs())
    _, _, bias, a, b = given.grads
    there = [[None if t is None else t.T.cuda().T for t in half] for half in (a, b)]
    bias = None if bias is None else bias.cuda()
    return given._replace(partial=given.partial.cuda(), grads=Grads(None, None, bias, *there))
