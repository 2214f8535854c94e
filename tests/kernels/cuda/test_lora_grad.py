"""lora_grads: the kernels' own source over an emulated block, and on a GPU where there is one."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu

from fused_lora.kernels.cuda import lora_grad as cuda
from fused_lora.kernels.cuda import native
from fused_lora.kernels.cuda.lora_grad_shape import GradCall, GradShape, fitting
from fused_lora.kernels.cuda.native import Chip
from fused_lora.kernels.interface import Adapters, Grads
from fused_lora.reference import lora_linear as reference
from fused_lora.testing.yardstick import error, in_every_order, judge_all
from fused_lora.types import Needs, Span

from .grad_cases import BF16, CASES, F16, F32, Case, Problem, few_bits, padded
from .serving import tf32

IDS = [case.why for case in CASES]
SMALL = Case("two adapters, a tail", 41, 72, 40, (Span(0, 16, 5), Span(16, 40, 11)))
ALL = Needs(x=False, bias=True)
NEEDS = [
    Needs(False, bias=bias, a=a, b=b)
    for a in (True, False)
    for b in (True, False)
    for bias in (True, False)
    if a or b or bias
]
BUDGET = 1e-6
ROUNDED_H = 1e-3  # h of GELU is not exact before it is rounded: now and then it is the other way


@pytest.fixture
def on_host(host: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The launcher uses the module whose kernels run on the CPU; torch allows TF32."""
    monkeypatch.setattr(native, "load", lambda: host)
    with tf32():
        yield host
    world(host, False, False)


def world(host: ModuleType, backwards: bool, late: bool, bulk: bool = False) -> None:
    """In which order emulated threads take turns, when copies land, and of what they are."""
    ctypes.CDLL(host.__file__).host_world(backwards, late, bulk)


def run(p: Problem, needs: Needs, processors: int = 2, **options: object) -> Grads:
    chip = Chip(p.case.arch, processors)
    return cuda.lora_grads(p.x, p.dy, p.adapters, needs, **p.given, **options, chip=chip)


def flat(grads: Grads) -> dict[str, Tensor]:
    """Each kind of gradient as one vector."""
    named = {"a": grads.a, "b": grads.b, "bias": [grads.bias]}
    there = {name: [t.flatten() for t in ts if t is not None] for name, ts in named.items()}
    return {name: torch.cat(ts) for name, ts in there.items() if ts}


def check(ours: Grads, truth: Grads, budget: float = BUDGET) -> None:
    got, wanted = flat(ours), flat(truth)
    assert got.keys() == wanted.keys()
    for name in got:
        assert error(got[name], wanted[name]) <= budget, name


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_emulated_kernel_equals_float64(on_host: ModuleType, case: Case) -> None:
    bulk = case.arch >= 90  # half of the runs, as those architectures copy
    for backwards, late in [(False, True), (True, False)]:
        world(on_host, backwards, late, bulk and late)
        problem, needs = Problem(case), Needs(x=False)
        check(run(problem, needs), problem.expected(needs))


FORMED = [case for case in CASES if "dh" not in case.given]


@pytest.mark.parametrize("case", FORMED, ids=[case.why for case in FORMED])
def test_dh_is_written_as_it_is_formed(on_host: ModuleType, case: Case) -> None:
    """Once by one block of a cluster, at the right of a bordered buffer, nothing beside it."""
    p, needs = Problem(case), Needs(x=False)
    m, rank = p.dh.shape
    whole = torch.full((m, 5 + rank + 3), 7.0, dtype=case.dtype)
    dh = whole[:, 5:-3]
    world(on_host, False, True, case.arch >= 90)
    ours = run(p, needs, dh_out=dh)
    assert torch.equal(dh, p.dh)
    assert (whole[:, :5] == 7).all() and (whole[:, -3:] == 7).all()
    alone = flat(run(p, needs))
    assert all(torch.equal(alone[name], value) for name, value in flat(ours).items())


@pytest.mark.parametrize("case", FORMED, ids=[case.why for case in FORMED])
def test_dh_is_written_without_da(on_host: ModuleType, case: Case) -> None:
    """From dy alone, beside db of a given h, beside dbias if that fits, or by itself."""
    p, chip = Problem(case), Chip(case.arch, 2)
    world(on_host, True, False, case.arch >= 90)
    with_bias = p.adapters.rank % 16 > 0  # dbias is one rank more
    for b, bias in {(True, with_bias), (True, False), (False, with_bias), (False, False)}:
        needs = Needs(False, bias=bias, a=False, b=b)
        whole = torch.full((case.m, 2 + p.adapters.rank + 1), 7.0, dtype=case.dtype)
        dh, h = whole[:, 2:-1], p.h if b else None
        ours = cuda.lora_grads(None, p.dy, p.adapters, needs, h=h, dh_out=dh, chip=chip)
        assert torch.equal(dh, p.dh)
        assert (whole[:, :2] == 7).all() and (whole[:, -1:] == 7).all()
        assert ours.a == [None] * len(case.spans)
        check(ours, p.expected(needs))


def test_what_is_formed_where_dh_is_written(on_host: ModuleType) -> None:
    given = GradShape(768, 768, 16, h_given=True, needs_a=False)
    written = given._replace(writes_dh=True)
    assert not given.forms_dh and not given.forms and written.forms_dh and written.forms
    assert not written._replace(dh_given=True).forms_dh
    assert written._replace(needs_a=True).forms_dh
    chip = Chip(90, 132)
    assert not given.form(chip).forms and written.form(chip).forms
    assert fitting(written, chip) == written
    wide = written._replace(n=8192, ranks=64)  # more than a cluster holds
    assert wide.form(chip) is None and not fitting(wide, chip).forms_dh


OF_U = [case for case in CASES if case.dtype is not F32]
KINDS = {"erf": "none", "tanh": "tanh"}


def of_u(case: Case, kind: str) -> tuple[Problem, Tensor]:
    """A problem, and the u that its x is GELU of, as exact as it is rounded."""
    p = Problem(case)
    u, p.x = p.x, gelu(p.x.double(), approximate=KINDS[kind]).to(case.dtype)
    p.h, p.dh = p.shrunk()
    return p, u


@pytest.mark.parametrize("case", OF_U, ids=[case.why for case in OF_U])
def test_x_is_formed_of_u(on_host: ModuleType, case: Case) -> None:
    for kind, late in (("erf", False), ("tanh", True)):
        world(on_host, not late, late, late and case.arch >= 90)
        p, u = of_u(case, kind)
        truth, needs = p.expected(Needs(x=False)), Needs(x=False)
        p.x = u
        ours = run(p, needs, activation=kind)
        check(ours._replace(b=[None]), truth._replace(b=[None]))
        assert error(flat(ours)["b"], flat(truth)["b"]) < ROUNDED_H


@pytest.mark.parametrize("given", ["", "h", "dh", "h dh"])
@pytest.mark.parametrize("needs", NEEDS, ids=str)
def test_every_subset_of_gradients_of_u(on_host: ModuleType, needs: Needs, given: str) -> None:
    """To the bit those of the x that was made before, in every world."""
    p, u = of_u(replace(SMALL, given=given), "erf")
    made = flat(run(p, needs))
    p.x = u
    for backwards, late, bulk in product((False, True), repeat=3):
        world(on_host, backwards, late, bulk)
        found = flat(run(p, needs, activation="erf"))
        assert all(torch.equal(found[name], value) for name, value in made.items())


def test_u_of_fp32_is_refused(on_host: ModuleType) -> None:
    p = Problem(replace(SMALL, dtype=F32))
    call = GradCall(p.x, p.dy, p.adapters, Needs(), None, None)
    assert call.why_not_activated("none") is None
    assert call.why_not_activated("erf") == "x is formed of a u of 16 bits, got torch.float32"
    with pytest.raises(AssertionError, match="of a u of 16 bits"):
        run(p, Needs(), activation="erf")


def test_what_dh_cannot_be_written_to(on_host: ModuleType) -> None:
    p = Problem(SMALL)
    call, out = GradCall(p.x, p.dy, p.adapters, Needs(), None, None), torch.empty_like(p.dh)
    assert call.why_not_written(out) is None is call.why_not_written(None)
    for wrong in (out[1:], out.float(), out.t().contiguous().t()):
        said = call.why_not_written(wrong)
        assert said and "dh is written as (41, 16) torch.bfloat16" in said, said
    said = call._replace(dh=p.dh).why_not_written(out)
    assert said == "dh is not formed here: it is given"


@pytest.mark.parametrize("given", ["", "h", "dh", "h dh"])
@pytest.mark.parametrize("needs", NEEDS, ids=str)
def test_every_subset_of_gradients(on_host: ModuleType, needs: Needs, given: str) -> None:
    for dtype in (BF16, F32):
        p = Problem(replace(SMALL, given=given, dtype=dtype))
        ours, truth = run(p, needs), p.expected(needs)
        check(ours, truth)
        assert [t is None for t in ours.a] == [not needs.a] * 2
        assert [t is None for t in ours.b] == [not needs.b] * 2


def test_one_side_is_enough(on_host: ModuleType) -> None:
    p, chip = Problem(SMALL), Chip(80, 2)
    truth = p.expected(Needs())
    check(Grads(None, None, None, cuda.a_grads(p.dh, p.x, p.adapters, chip=chip), []),
          truth._replace(b=[]))  # fmt: skip
    check(Grads(None, None, None, [], cuda.b_grads(p.h, p.dy, p.adapters, chip=chip)),
          truth._replace(a=[]))  # fmt: skip


@pytest.mark.parametrize("dtype, beta", [(F32, 1), (BF16, 1), (F32, 0)])
def test_into_an_owners_block(on_host: ModuleType, dtype: torch.dtype, beta: int) -> None:
    """A transposed block of a larger tensor: added to, or written where ``beta`` is 0 whatever it
    held; rounded once, all beside it as it was."""
    p, needs = Problem(SMALL), Needs()
    owners = [
        [few_bits(t.shape[1] + 4, t.shape[0] + 3).to(dtype) for t in halves]
        for halves in p.adapters[:2]
    ]
    before = [[owner.clone() for owner in halves] for halves in owners]
    blocks = [
        [owner[1 : t.shape[1] + 1, 2 : t.shape[0] + 2].T for owner, t in zip(*halves, strict=True)]
        for halves in zip(owners, p.adapters[:2], strict=True)
    ]
    if not beta:
        [block.fill_(torch.nan) for halves in blocks for block in halves]
    ours = run(p, needs, into=tuple(blocks), beta=beta)
    truth = p.expected(needs)
    assert ours.a[0] is blocks[0][0] and ours.b[1] is blocks[1][1]
    rows = zip((*owners[0], *owners[1]), (*before[0], *before[1]), truth.a + truth.b, strict=True)
    for owner, was, grad in rows:
        rows, columns = grad.shape
        inside = was[1 : columns + 1, 2 : rows + 2]
        inside.mul_(beta).add_(grad.T)
        assert torch.equal(owner, was)


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_same_inputs_same_bits_in_every_world(on_host: ModuleType, dtype: torch.dtype) -> None:
    """And the number of slices does not move a gradient by more than fp32 sums do."""
    p = Problem(replace(SMALL, dtype=dtype))
    p.x, p.dy = (torch.randn(t.shape).to(dtype) for t in (p.x, p.dy))
    runs = []
    for backwards, late, bulk in product((False, True), repeat=3):
        world(on_host, backwards, late, bulk)
        runs.append(flat(run(p, ALL)))
    for other in runs[1:]:
        assert all(torch.equal(runs[0][name], other[name]) for name in runs[0])
    for name, value in flat(run(p, ALL, processors=1)).items():
        assert error(value, runs[0][name]) < 1e-6 or (name == "bias" and dtype is BF16)


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("given", ["", "h dh"])
def test_ordinary_numbers_keep_the_yardstick(
    on_host: ModuleType, dtype: torch.dtype, given: str
) -> None:
    p = Problem(Case("qkv", 197, 136, 216, CASES[10].spans, dtype, dtype, given=given))
    p.x, p.dy = (torch.randn(t.shape).to(dtype) for t in (p.x, p.dy))
    a, b = ([torch.randn(t.shape).to(dtype) / 8 for t in halves] for halves in p.adapters[:2])
    p.adapters = p.adapters._replace(a=a, b=b)
    p.h, p.dh = p.shrunk()

    def plain(x: Tensor, dy: Tensor, a: list[Tensor], b: list[Tensor]) -> Grads:
        w = x.new_zeros(dy.shape[1], x.shape[1])
        scales, spans = p.adapters[2:]
        return reference.backward(dy, x, w, a, b, scales, spans, Needs(x=False, bias=True))

    wide = [[t.double() for t in halves] for halves in (a, b)]
    truth = flat(plain(p.x.double(), p.dy.double(), *wide))
    theirs = in_every_order(lambda: flat(plain(p.x, p.dy, a, b)))
    if dtype is F32:  # a CPU forms no product by TF32
        theirs = [run | flat(p.expected(Needs())) for run in theirs]
    verdict = judge_all(flat(run(p, ALL)), theirs, truth, dtype)
    assert verdict.passed, str(verdict)


def test_no_rows_give_zeros(on_host: ModuleType) -> None:
    ours = run(Problem(replace(SMALL, m=0)), ALL)
    assert all((grad == 0).all() for grad in flat(ours).values())


FITS = [
    (384, 384, 16, 89, True), (384, 1536, 16, 80, False), (384, 1536, 16, 90, True),
    (384, 384, 64, 80, False),
    (384, 384, 64, 90, True), (768, 768, 16, 80, True), (768, 768, 16, 89, False),
    (768, 768, 32, 80, False), (768, 768, 32, 90, True), (768, 768, 48, 90, True),
    (1024, 1024, 16, 80, False), (1024, 1024, 16, 100, True), (1024, 1024, 64, 90, True),
    (768, 3072, 16, 90, True), (4096, 4096, 16, 90, True), (4096, 4096, 64, 90, False),
    (768, 768, 16, 120, True), (768, 3072, 16, 80, False),
    (64, 64, 64, 90, True), (64, 64, 65, 90, False), (60, 64, 4, 90, False),
]  # fmt: skip


@pytest.mark.parametrize("k, n, ranks, arch, wanted", FITS)
def test_fits(on_host: ModuleType, k: int, n: int, ranks: int, arch: int, wanted: bool) -> None:
    assert cuda.fits(k, n, ranks, arch) is wanted


FITS_TF32 = [
    (384, 384, 16, 89, True), (384, 384, 32, 89, True), (384, 384, 48, 89, False),
    (384, 384, 48, 80, False), (768, 768, 16, 80, True), (768, 768, 16, 120, True),
    (768, 768, 32, 120, True), (768, 768, 48, 90, True), (1024, 1024, 64, 90, True),
    (768, 3072, 16, 90, True), (4096, 4096, 16, 100, True), (4096, 4096, 32, 90, False),
    (100, 68, 4, 86, True), (102, 68, 4, 90, False),
]  # fmt: skip


@pytest.mark.parametrize("k, n, ranks, arch, wanted", FITS_TF32)
def test_fits_in_tf32(
    on_host: ModuleType, k: int, n: int, ranks: int, arch: int, wanted: bool
) -> None:
    assert cuda.fits(k, n, ranks, arch, tf32=True) is wanted


def test_given_fits_whatever_the_width(on_host: ModuleType) -> None:
    for arch in (80, 86, 89, 90, 100, 120):
        for ranks in range(1, 65):
            for wide in (False, True):
                assert cuda.fits(4096, 16384, ranks, arch, given=True, tf32=wide)
    assert not cuda.fits(4096, 16384, 65, 90, given=True)


LIMIT_BYTES = {
    80: 163 << 10,
    86: 99 << 10,
    89: 99 << 10,
    90: 227 << 10,
    100: 227 << 10,
    120: 99 << 10,
}


def test_plans_stay_within_shared_memory(on_host: ModuleType) -> None:
    flags = dict(needs_a=True, needs_b=True, needs_bias=False, rows=10**6, processors=132)
    for arch, limit in LIMIT_BYTES.items():
        sizes = [(384, 384), (768, 768), (768, 3072), (4096, 4096)]
        for (k, n), ranks in product(sizes, (4, 16, 32, 48, 64)):
            for given, wide in product((False, True), repeat=2):
                shape = dict(k=k, n=n, ranks=ranks, h_given=given, dh_given=given, arch=arch)
                plan = on_host.plan_lora_grad(**shape, **flags, tf32=wide)
                assert plan is None or 0 < plan.smem_bytes <= limit
                assert plan is None or plan.partial_floats * 4 < 64 << 20


def test_sentences(on_host: ModuleType) -> None:
    p = Problem(SMALL)
    good = GradCall(p.x, p.dy, p.adapters, Needs(), None, None)
    wide = Problem(replace(SMALL, n=4096, spans=(Span(0, 4096, 16),)))
    bad = {
        "x is needed": good._replace(x=None),
        "dy is needed": good._replace(dy=None, h=p.h),
        "5 adapters": good._replace(adapters=Adapters(*([t[0]] * 5 for t in p.adapters))),
        "of float32, bfloat16": good._replace(x=p.x.double(), dy=p.dy.double()),
        "all of one dtype": good._replace(h=p.h.half()),
        "one dtype": good._replace(
            adapters=p.adapters._replace(a=[t.half() for t in p.adapters.a])
        ),
        "rows of x": good._replace(x=p.x.T.contiguous().T),
        "16 bytes": good._replace(dy=p.dy[:, 4:12]),
        "cannot hold rank 16": GradCall(wide.x, wide.dy, wide.adapters, Needs(), None, None),
    }
    fp32 = good._replace(x=p.x.float(), dy=p.dy.float())
    quarter = fp32._replace(dy=padded(p.dy.float(), 4, F32)[:, 4:])
    assert [call.why_not(Chip(80, 2)) for call in (good, fp32, quarter)] == [None] * 3
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    bad["fp32_precision is 'ieee'"] = fp32
    for sentence, call in bad.items():
        assert sentence in call.why_not(Chip(80, 2))


def test_the_module_refuses_what_would_read_out_of_place(on_host: ModuleType) -> None:
    p = Problem(SMALL)
    plan = GradCall(p.x, p.dy, p.adapters, Needs(), None, None).plan(Chip(80, 2))
    types = dict.fromkeys(("type", "adapter"), on_host.DType.bfloat16)
    place = dict(first_column=0, columns=40, first_rank=0, rank=16, scale=1.0)
    group = on_host.GradGroup(a_strides=(1, 1), b_strides=(1, 1), **place)
    rows = dict(x_row=72, dy_row=40, h_row=0, dh_row=0, dh_out_row=0, rows=41)
    names = ("x", "dy", "h", "dh", "dh_out", "partial", "mean", "rstd", "gamma", "beta")
    whole = types | rows | dict(groups=[group])
    at = dict.fromkeys(names, 0) | dict(x=p.x.data_ptr(), dy=p.dy.data_ptr())

    def launch(plan, change, where) -> None:
        bound = on_host.BoundGrad(plan=plan, **(whole | change))
        adapters = [0] * (2 * len((whole | change)["groups"]))
        bound([(at | where)[name] for name in names] + adapters, 0, 0)

    bad = {
        "x must begin": ({}, dict(x=p.x.data_ptr() + 2)),
        "h and dh": ({}, dict(h=p.h.data_ptr())),
        "planned for x and dy of 16 bits": (dict(type=on_host.DType.float32), {}),
        "1 to 4 groups": (dict(groups=[]), {}),
        "rows of the written dh overlap": (dict(dh_out_row=15), dict(dh_out=p.dh.data_ptr())),
        "group 1": (dict(groups=[group, group]), {}),
    }
    for message, (change, where) in bad.items():
        with pytest.raises(ValueError, match=message):
            launch(plan, change, where)
    with pytest.raises(ValueError, match="1 groups have 12 addresses, got 9"):
        on_host.BoundGrad(plan=plan, **whole)([0] * 9, 0, 0)
    fp32 = GradCall(p.x.float(), p.dy.float(), p.adapters, Needs(), None, None).plan(Chip(90, 2))
    with pytest.raises(ValueError, match="is given of 16 bits, planned for fp32"):
        launch(fp32, dict(type=on_host.DType.float32, activation=on_host.Activation.erf), {})
    asked = GradCall(None, p.dy, p.adapters, Needs(a=False), p.h, None, writes_dh=True)
    with pytest.raises(ValueError, match="dh must be written as planned"):
        launch(asked.plan(Chip(80, 2)), dict(h_row=16), dict(h=p.h.data_ptr(), x=0))
    given = GradCall(p.x, p.dy, p.adapters, Needs(), p.h, p.dh).plan(Chip(80, 2))
    written = dict(h_row=16, dh_row=16, dh_out_row=16)
    where = dict(h=p.h.data_ptr(), dh=p.dh.data_ptr(), dh_out=p.dh.data_ptr())
    with pytest.raises(ValueError, match="written where it is formed"):
        launch(given, written, where)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=IDS)
@tf32()
def test_kernel_equals_float64(case: Case) -> None:
    if reason := native.why_not():
        pytest.skip(reason)
    on_cpu, needs = Problem(case), Needs(x=False)
    p = Problem(case)
    p.x, p.dy = (padded(t, case.rows, case.dtype, "cuda") for t in (p.x, p.dy))
    p.h, p.dh = p.h.cuda(), p.dh.cuda()
    p.adapters = p.adapters._replace(
        a=[t.cuda() for t in p.adapters.a], b=[t.cuda() for t in p.adapters.b]
    )
    if reason := cuda.why_not(p.x, p.dy, p.adapters, needs, **p.given):
        pytest.skip(reason)
    ours = cuda.lora_grads(p.x, p.dy, p.adapters, needs, **p.given)
    again = cuda.lora_grads(p.x, p.dy, p.adapters, needs, **p.given)
    check(Grads(*ours[:3], *([t.cpu() for t in halves] for halves in ours[3:])),
          on_cpu.expected(needs))  # fmt: skip
    assert all(torch.equal(flat(ours)[name], value) for name, value in flat(again).items())
    if case.dtype is not F32:
        source, u = of_u(case, "erf")
        given = dict(h=source.h.cuda(), dh=source.dh.cuda(), activation="erf")
        u = padded(u, case.rows, case.dtype, "cuda")
        found = cuda.lora_grads(u, p.dy, p.adapters, needs, **given)
        check(Grads(*found[:3], *([t.cpu() for t in halves] for halves in found[3:])),
              source.expected(needs))  # fmt: skip
    if "dh" not in case.given:  # formed on chip, and written as well
        dh = torch.full_like(p.dh, 7.0)
        first = cuda.lora_grads(p.x, p.dy, p.adapters, needs, **p.given, dh_out=dh)
        assert torch.equal(dh.cpu(), on_cpu.dh)
        assert all(torch.equal(flat(ours)[name], value) for name, value in flat(first).items())
