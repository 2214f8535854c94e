"""MLP chains whose GELU, and its slope, stand in the epilogues of fc1 and of fc2's dx."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fused_lora.kernels.aten import lora_linear as aten
from fused_lora.kernels.triton import lora_extended, lora_one_pass, lora_shrink
from fused_lora.ops import elementwise
from fused_lora.ops.epilogues import plan_in_context
from fused_lora.ops.lora_block import lora_mlp
from fused_lora.ops.lora_linear import call_plan
from fused_lora.ops.operand import RECOMPUTE
from fused_lora.testing.yardstick import in_every_order, judge_all
from fused_lora.types import (
    DEFAULT_TRAITS,
    Backend,
    Forward,
    FusionContext,
    Gradient,
    Impl,
    Keep,
    Needs,
    Plan,
    Span,
)
from tests.kernels.triton.interpreted.serving import serving, small_tiles  # noqa: F401
from tests.ops.block_problems import cast, leaves, matrix, norm, plain_mlp, plain_norm

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
D, H = 24, 40
KINDS = ("erf", "tanh")
NAMES = {"erf": "gelu", "tanh": "gelu_tanh"}
each_mode = pytest.mark.parametrize("recompute", RECOMPUTE)
BACKWARD = {  # what comes before the two dx, the first with the slope
    "none": [],
    "elementwise": ["gelu forward"],
    "gemm": ["product erf"],
}


@pytest.fixture
def passes(serving, small_tiles) -> list[str]:  # noqa: F811
    """The products and activations that ran, in order, where Triton's EXTENDED wins."""
    ran: list[str] = []
    serving.setenv("FUSED_LORA_PROGRAMS", "0")  # what is watched are the calls themselves
    for name, value in {
        "TRITON_EFFICIENCY": 1e6,
        "TRITON_LAUNCH_CALLS": 0.0,
        "MERGE_EFFICIENCY": 1e-9,
    }.items():
        serving.setattr(f"fused_lora.plan.cost_kernels.{name}", value)
    serving.setattr("fused_lora.plan.strategies.ONE_PASS_RANKS", 0)
    watch(serving, lora_extended, "forward", "product", ran)
    watch(serving, lora_extended, "input_grad", "dx", ran)
    watch(serving, elementwise, "gelu_forward", "gelu forward", ran)
    watch(serving, elementwise, "gelu_input_grad", "gelu grad", ran)
    watch(serving, elementwise, "gelu_shrink", "gelu and h", ran)
    return ran


def watch(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, said: str, ran: list[str]
) -> None:
    right = getattr(module, name)

    def watched(*args, **options):
        given = [*args, options.get("activation")]
        kinds = [t for t in given if isinstance(t, str) and t in KINDS] * (module is lora_extended)
        ran.append(" ".join([said, *kinds]))
        return right(*args, **options)

    monkeypatch.setattr(module, name, watched)


def operands(dtype=BF16, rows=(2, 19), sizes=(D, H), **trains):
    """x, a norm, fc1 and fc2."""
    d, h = sizes
    x = torch.randn(*rows, d, dtype=dtype, requires_grad=trains.pop("x", True))
    how = {"dtype": dtype, "w": False, "bias": False, **trains}
    return x, norm(d, dtype, trains=False), matrix(h, d, 3, **how), matrix(d, h, 5, **how)


def run(given, dtype, recompute, activation="gelu", impl=Impl.AUTO) -> list[Tensor]:
    """y and the gradients of every leaf."""
    x, before, *fcs = given = cast(given, dtype)
    fcs = [fc._replace(impl=impl) for fc in fcs]
    y = lora_mlp(x, *fcs, activation, norm=before, around=True, recompute=recompute)
    return [y.detach(), *gradients(y, given)]


def plain(given, dtype, activation="gelu") -> list[Tensor]:
    x, before, *fcs = given = cast(given, dtype)
    y = x + plain_mlp(plain_norm(x, before), *fcs, activation, None)
    return [y.detach(), *gradients(y, given)]


def gradients(y, given):
    torch.manual_seed(1)
    weight = torch.randn(y.shape).to(y.dtype)
    return torch.autograd.grad(y, leaves(*given), weight) if leaves(*given) else ()


def within(ours, given, dtype, activation="gelu") -> None:
    theirs = in_every_order(lambda: plain(given, dtype, activation))
    verdict = judge_all(ours, theirs, plain(given, F64, activation), dtype)
    assert verdict.passed, str(verdict)


@each_mode
@pytest.mark.parametrize("kind", KINDS)
def test_the_epilogues_are_asked_for(passes, recompute, kind):
    given = operands()
    ours = run(given, BF16, recompute, NAMES[kind])
    again = [one.replace("erf", kind) for one in BACKWARD[recompute]]
    assert passes == [f"product {kind}", "product", *again, f"dx {kind}", "dx"]
    within(ours, given, BF16, NAMES[kind])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_dtypes_and_odd_sizes(passes, dtype):
    given = operands(dtype, (1, 33), (23, 37))
    within(run(given, dtype, "elementwise"), given, dtype)
    assert "product erf" in passes and "dx erf" in passes


SUBSETS = [
    {"x": False},
    {"a": False},
    {"b": False},
    {"x": False, "a": False},
    {"w": True, "bias": True},
    {"x": False, "a": False, "b": False, "w": True},
    {"a": False, "b": False},
    {"x": False, "a": False, "b": False},
]


@each_mode
@pytest.mark.parametrize("trains", SUBSETS, ids=str)
def test_every_subset_of_gradients(passes, recompute, trains):
    given = operands(rows=(1, 5), **trains)
    within(run(given, BF16, recompute), given, BF16)
    assert passes[:2] == ["product erf", "product"]
    trained = bool(leaves(*given))
    assert passes.count("dx erf") == trained and "gelu grad" not in passes


@pytest.mark.parametrize(
    "grad, recompute, stored",
    [
        (False, "none", 0),
        (True, "gemm", 0),
        (True, "none", 1),
        (True, "elementwise", 1),
    ],
)
def test_u_is_stored_where_backward_reads_it(passes, serving, grad, recompute, stored):  # noqa: F811
    right, found = lora_extended.forward, []

    def spy(*args, **options):
        done = right(*args, **options)
        found.append(done.u is not None)
        return done

    serving.setattr(lora_extended, "forward", spy)
    x, before, fc1, fc2 = operands(rows=(1, 5))
    with torch.set_grad_enabled(grad):
        y = lora_mlp(x, fc1, fc2, norm=before, recompute=recompute)
        lora_mlp(x.detach(), frozen(fc1), frozen(fc2), norm=before, recompute=recompute)
    assert found == [stored, False, False, False]
    if grad:
        y.sum().backward()
        assert sum(found[4:]) == (recompute == "gemm")


def frozen(fc):
    """``fc``, of which nothing trains."""
    halves = [[t.detach() for t in half] for half in (fc.a, fc.b)]
    return fc._replace(a=halves[0], b=halves[1])


@each_mode
def test_it_keeps_what_it_kept(passes, recompute):
    x, before, fc1, fc2 = operands()
    kept = []
    for impl in (Impl.TRITON, Impl.ATEN):
        both = [fc._replace(impl=impl) for fc in (fc1, fc2)]
        y = lora_mlp(x, *both, norm=before, around=True, recompute=recompute)
        saved = {t.untyped_storage() for t in y.grad_fn.saved_tensors if t is not None}
        kept.append(sum({s.data_ptr(): s.nbytes() for s in saved}.values()))
    assert kept[0] == kept[1] and passes.count("product erf") == 1


@pytest.mark.parametrize("wide", [False, True], ids=["in 16 bits", "in fp32 under autocast"])
def test_one_pass_adds_the_residual(passes, serving, wide):  # noqa: F811
    """fc2's product in its own pass; fc1's, which no residual follows, adds none."""
    one = Plan(Forward.ONE_PASS, Forward.ONE_PASS, Gradient.RANK, Keep.HIDDEN, 0, Backend.TRITON)
    for module in ("chain.linear", "epilogues", "lora_linear"):
        serving.setattr(f"fused_lora.ops.{module}.call_plan", lambda *_, **__: one)
    joined, right = [], lora_one_pass.forward

    def spy(*args, **options):
        residual = options.get("residual")
        done = right(*args, **options)
        joined.append(None if residual is None else (residual.dtype, done.y.dtype))
        return done

    serving.setattr(lora_one_pass, "forward", spy)
    dtype = F32 if wide else BF16
    given = operands(dtype)
    with torch.autocast("cpu", BF16, enabled=wide):
        ours = run(given, dtype, "elementwise")
        assert joined == [None, (dtype, dtype)]
        for module in ("chain.linear", "epilogues", "lora_linear"):
            serving.setattr(f"fused_lora.ops.{module}.call_plan", call_plan)
        others = in_every_order(lambda: run(given, dtype, "elementwise", impl=Impl.ATEN))
    verdict = judge_all(ours, others, plain(given, F64), BF16)
    assert verdict.passed, str(verdict)


def test_into_the_room_of_fc2(passes, serving):  # noqa: F811
    """fc1's epilogue writes act(u) where fc2's one GEMM reads it."""
    ends = Plan(Forward.EXTENDED, Forward.EXTENDED, Gradient.RANK, Keep.HIDDEN, 0, Backend.TRITON)
    one = Plan(Forward.BORDERED, Forward.SEPARATE, Gradient.RANK, Keep.HIDDEN)
    choose = lambda like, w, *_, **__: one if w.shape == (D, H) else ends  # noqa: E731
    for module in ("chain.linear", "epilogues", "lora_linear"):
        serving.setattr(f"fused_lora.ops.{module}.call_plan", choose)
    seen, right = [], aten.forward

    def spy(x, w, bias, adapters, plan, bordered=None, h=None, **made):
        seen.append((x, bordered))
        return right(x, w, bias, adapters, plan, bordered, h, **made)

    serving.setattr(aten, "forward", spy)
    given = operands()
    within(run(given, BF16, "elementwise"), given, BF16)
    ((x, buffer),) = seen
    assert buffer is not None and buffer.shape == (38, H + 5) and x.data_ptr() == buffer.data_ptr()
    assert passes == ["product erf", "gelu forward", "gelu grad", "dx"]


@each_mode
def test_h_of_fc1_comes_with_its_norm(passes, serving, recompute):  # noqa: F811
    shrinks: list[str] = []
    watch(serving, lora_shrink, "shrink", "shrink", shrinks)
    given = operands()
    ours = run(given, BF16, recompute)
    again = recompute == "gemm"  # which keeps no h: backward makes that of fc2 for its db
    assert len(shrinks) == 1 + again  # fc2's: GELU stands in an epilogue, which forms none
    within(ours, given, BF16)


def test_h_into_the_room_of_both(passes, serving):  # noqa: F811
    """LayerNorm and GELU write [x | h] where the library's one GEMM reads it."""
    one = Plan(Forward.BORDERED, Forward.SEPARATE, Gradient.RANK, Keep.HIDDEN)
    for module in ("chain.linear", "epilogues", "lora_linear"):
        serving.setattr(f"fused_lora.ops.{module}.call_plan", lambda *_, **__: one)
    seen, right = [], aten.forward

    def spy(x, w, bias, adapters, plan, bordered=None, h=None, **made):
        ends = [t.data_ptr() for t in bordered.split([x.shape[1], adapters.rank], 1)]
        seen.append([x.data_ptr(), h.data_ptr()] == ends)
        return right(x, w, bias, adapters, plan, bordered, h, **made)

    serving.setattr(aten, "forward", spy)
    serving.setattr(aten, "shrink", lambda *_: pytest.fail("x was read for h alone"))
    given = operands()
    ours = run(given, BF16, "elementwise")
    assert seen == [True, True] and passes == ["gelu and h", "gelu forward", "gelu grad"]
    serving.undo()
    within(ours, given, BF16)


@each_mode
def test_under_autocast(passes, recompute):
    given = operands(F32)
    with torch.autocast("cpu", BF16):
        ours = run(given, F32, recompute)
        others = in_every_order(lambda: run(given, F32, recompute, impl=Impl.ATEN))
    assert passes[0] == "product erf" and "dx erf" in passes
    verdict = judge_all(ours, others, plain(given, F64), BF16)
    assert verdict.passed, str(verdict)
    assert [t.dtype for t in ours] == [t.dtype for t in others[0]]


def test_under_checkpoint_the_same_bits(passes):
    x, before, fc1, fc2 = given = operands()
    half = lambda x: lora_mlp(x, fc1, fc2, norm=before)  # noqa: E731
    y, other = half(x), checkpoint(half, x, use_reentrant=False)
    assert torch.equal(y, other)
    assert all(map(torch.equal, gradients(y, given), gradients(other, given)))
    assert passes.count("dx erf") == 2


def test_traced_it_is_composed(passes):
    x, before, fc1, fc2 = operands(F32)
    half = lambda x: lora_mlp(x, fc1, fc2, norm=before)  # noqa: E731
    traced = torch.compile(half, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(traced(x), half(x))


@pytest.mark.parametrize("what", ["forward", "input_grad"])
def test_a_broken_epilogue_leaves_the_chain_as_it_was(passes, checking, what):
    right = getattr(lora_extended, what)

    def broken(*args, **options):
        found = right(*args, **options)
        if "erf" in (*[t for t in args if isinstance(t, str)], options.get("activation")):
            found[0][-1, -1] += 1
        return found

    checking.setattr(lora_extended, what, broken)
    given = operands()
    with pytest.warns(RuntimeWarning, match="does not use triton extended_gelu .*error .* over"):
        run(given, BF16, "elementwise")
    x, w, spans = torch.zeros(38, D, dtype=BF16), given[2].w, (Span(0, H, 3),)
    question = (x, w, True, spans, Needs(), DEFAULT_TRAITS)
    assert plan_in_context(*question, Impl.AUTO, BF16, FusionContext(activated=True)) == call_plan(
        *question
    )
    passes.clear()
    within(run(given, BF16, "elementwise"), given, BF16)
    assert passes == [
        "product",
        "gelu and h",
        "product",
        "gelu forward",
        "dx",
        "gelu grad",
        "dx",
    ]


def test_where_nothing_may(passes):
    given = operands()
    for impl in (Impl.ATEN, Impl.REFERENCE):
        run(given, BF16, "elementwise", impl=impl)
    run(operands(F64), F64, "elementwise")
    run(given, BF16, "elementwise", "silu")
    assert not [one for one in passes if "erf" in one]


def test_no_rows(passes):
    given = operands(rows=(0, 5))
    assert all(torch.isfinite(t).all() for t in run(given, BF16, "gemm"))
    assert not [one for one in passes if "erf" in one]
