"""lora_linear and lora_merge by Triton on a GPU, end to end: checked first, then right."""

import warnings

import pytest
import torch

from fused_lora.kernels.interface import Epilogue
from fused_lora.kernels.triton import available
from fused_lora.ops import backends, elementwise, planning
from fused_lora.ops.lora_block import lora_attention, lora_mlp
from fused_lora.ops.lora_dropout import why_not_triton
from fused_lora.ops.lora_linear import NO_GRADIENT, Frame, compute, lora_linear
from fused_lora.ops.lora_merge import Job, lora_merge, lora_merge_many
from fused_lora.ops.lora_shrink import shrink
from fused_lora.programs import run as programs
from fused_lora.testing.yardstick import error, in_every_order, judge_all
from fused_lora.types import Backend, Forward, Impl, Needs, Span
from fused_lora.verify import verdicts
from tests.ops.block_problems import leaves, matrix, norm

pytestmark = pytest.mark.gpu
QKV = tuple(Span(384 * g, 384 * g + 384, 16) for g in range(3))


@pytest.fixture(autouse=True)
def on_device(monkeypatch, tmp_path):
    """Tensors on the GPU, verdicts of the test's own, and no warning about a kernel."""
    if said := available.why_not():
        pytest.skip(said)
    monkeypatch.setenv("FUSED_LORA_CACHE_DIR", str(tmp_path))
    planning._plan_for.cache_clear()
    verdicts.forget()
    with torch.device("cuda"), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield
    planning._plan_for.cache_clear()
    verdicts.forget()


def operands(dtype, m=(4, 197)):
    x = torch.randn(*m, 384).to(dtype).requires_grad_()
    w, bias = (torch.randn(1152, 384) / 20).to(dtype), torch.randn(1152).to(dtype)
    a = [(torch.randn(16, 384) / 20).requires_grad_() for _ in QKV]
    b = [(torch.randn(384, 16) / 4).requires_grad_() for _ in QKV]
    return x, w, bias, a, b


def run(impl, x, w, bias, a, b, scales=(1.0, 0.5, 2.0)):
    leaves = [x, *a, *b]
    y = lora_linear(x, w, bias, a, b, scales, QKV, impl=impl)
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y) / 8)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_values_and_gradients(dtype, impl):
    x, w, bias, a, b = operands(dtype)
    cast = lambda kind: [  # noqa: E731
        x.detach().to(kind).requires_grad_(), w.to(kind), bias.to(kind),
        *([t.detach().to(kind).requires_grad_() for t in half] for half in (a, b)),
    ]  # fmt: skip
    plain = in_every_order(lambda: run("reference", *cast(dtype)))
    truth = run("reference", *cast(torch.float64))
    verdict = judge_all(run(impl, x, w, bias, a, b), plain, truth, dtype)
    assert verdict.passed, str(verdict)


def test_same_inputs_same_bits():
    x, w, bias, a, b = operands(torch.bfloat16)
    once, again = (run("triton", x, w, bias, a, b) for _ in range(2))
    assert all(map(torch.equal, once, again))


def test_autocast():
    x, w, bias, a, b = operands(torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        ours = run("triton", x, w, bias, a, b)
    assert [t.dtype for t in ours] == [torch.bfloat16, *[torch.float32] * 7]


def test_compiled():
    x, w, bias, a, b = operands(torch.bfloat16)
    y = torch.compile(lora_linear, fullgraph=True)(x, w, bias, a, b, (1.0, 0.5, 2.0), QKV)
    torch.testing.assert_close(y, lora_linear(x, w, bias, a, b, (1.0, 0.5, 2.0), QKV))


def test_a_capture_of_what_was_not_checked_takes_the_library():
    x, w, bias, a, b = operands(torch.bfloat16)
    call = lambda: lora_linear(x, w, bias, a, b, (1.0, 0.5, 2.0), QKV)  # noqa: E731
    with torch.no_grad():
        run("aten", x, w, bias, a, b)  # the library's own warm-up
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        assert not verdicts.path().exists()
        graph.replay()
        eager = call()
    assert error(captured, eager.double()) < 1e-2


def test_a_capture_of_what_was_checked_replays_it():
    x, w, bias, a, b = operands(torch.bfloat16)
    call = lambda: lora_linear(x, w, bias, a, b, (1.0, 0.5, 2.0), QKV, impl="triton")  # noqa: E731
    with torch.no_grad():
        eager = call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        captured.zero_()
        graph.replay()
    assert torch.equal(captured, eager)


def test_the_check_leaves_the_callers_state_alone():
    before, stream = torch.cuda.get_rng_state(), torch.cuda.current_stream()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        x, w, bias, a, b = operands(torch.bfloat16)
        state = torch.cuda.get_rng_state()
        run("triton", x, w, bias, a, b)
        assert torch.cuda.current_stream() == side
    assert torch.equal(torch.cuda.get_rng_state(), state) and before.shape == state.shape
    assert torch.cuda.current_stream() == stream


def test_another_process_finds_the_verdicts():
    plan = lambda: planning.plan_for(  # noqa: E731
        25216, 768, 768, (Span(0, 768, 16),), torch.bfloat16, True, Needs(), torch.device("cuda", 0)
    )
    first = plan()
    kept = verdicts.path().read_text() if first.backend is Backend.TRITON else ""
    planning._plan_for.cache_clear()
    verdicts.forget()
    assert plan() == first
    assert kept == (verdicts.path().read_text() if kept else "")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_merge(dtype, impl):
    _, w, _, a, b = operands(dtype)
    merged = lora_merge(w, a, b, (1.0, 0.5, 2.0), QKV, impl=impl).detach()
    double = [[t.detach().double() for t in half] for half in (a, b)]
    truth = lora_merge(w.double(), *double, (1.0, 0.5, 2.0), QKV, impl="reference")
    assert error(merged, truth) <= torch.finfo(dtype).eps


def test_partners_serve_by_name():
    x, gamma = torch.randn(1576, 768, dtype=torch.bfloat16), torch.randn(768)
    bordered = x.new_zeros(1576, 784)[:, :768]
    for call in (
        lambda impl: elementwise.layer_norm_forward(
            x, gamma, gamma, 1e-6, bordered, impl=impl
        ).y.clone(),
        lambda impl: elementwise.gelu_forward(x, "erf", bordered, impl=impl).clone(),
        lambda impl: elementwise.gelu_input_grad(x, x, "tanh", impl=impl),
    ):
        ours, plain = (call(impl).double() for impl in (Impl.TRITON, Impl.ATEN))
        assert error(ours, plain) < 1e-2


def test_dropout_draws_one_mask_for_both_passes():
    x, a = torch.ones(1576, 768, requires_grad=True), torch.ones(1, 768)
    assert why_not_triton(x.detach(), a.shape[0], 0.5) is None
    h = shrink(x, a, 0.5)
    (dx,) = torch.autograd.grad(h, x, torch.ones_like(h))
    torch.testing.assert_close(dx.sum(1, keepdim=True), h.detach())
    assert abs(float((dx > 0).float().mean()) - 0.5) < 0.01


def test_a_linear_with_dropout_by_its_program_and_as_written(monkeypatch):
    """The launches that are bound take the words of a new seed each time, and the same bits."""
    x, w, bias, a, b = operands(torch.bfloat16)

    def run(seed):
        torch.manual_seed(seed)
        y = lora_linear(x, w, bias, a, b, (1.0, 0.5, 2.0), QKV, dropout=0.3)
        return [y, *torch.autograd.grad(y.float().square().sum(), (*a, *b))]

    recorded = [run(seed) for seed in (3, 3, 4)]
    monkeypatch.setenv("FUSED_LORA_PROGRAMS", "0")
    programs.forget()
    written = [run(seed) for seed in (3, 3, 4)]
    for ours, theirs in zip(recorded, written, strict=True):
        assert all(map(torch.equal, ours, theirs))
    assert not torch.equal(recorded[1][0], recorded[2][0])


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_merges_of_many_layers(impl):
    jobs = []
    for _ in range(3):
        _, w, _, a, b = operands(torch.bfloat16)
        jobs.append(Job(w, a, b, (1.0, 0.5, 2.0), QKV))
    for ours, job in zip(lora_merge_many(jobs, impl=impl), jobs, strict=True):
        truth = lora_merge(*job[:5], impl="reference").detach()
        assert error(ours, truth.double()) <= torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("recompute", ["none", "elementwise", "gemm"])
def test_an_mlp_by_its_epilogues(recompute):
    """The plan may pick others for its shapes: whatever serves is near the library."""
    before, sizes = norm(384, torch.bfloat16, trains=False), ((1536, 384), (384, 1536))
    fcs = [matrix(*size, 16, dtype=torch.bfloat16, w=False, bias=False) for size in sizes]
    x = torch.randn(4, 197, 384, dtype=torch.bfloat16, requires_grad=True)
    runs = []
    for impl in (Impl.TRITON, Impl.ATEN):
        both = [fc._replace(impl=impl) for fc in fcs]
        y = lora_mlp(x, *both, norm=before, around=True, recompute=recompute)
        runs.append([y.detach(), *torch.autograd.grad(y, leaves(x, fcs), torch.ones_like(y) / 8)])
    for ours, plain in zip(*runs, strict=True):
        assert error(ours, plain.double()) < 2e-2


@pytest.mark.parametrize("half", ["attention", "mlp"])
def test_a_block_of_open_products(half, monkeypatch):
    """By the library's plans of one GEMM each way, whose terms Triton's kernels add."""
    every = backends.plans

    def asked(*question):
        found = [plan for plan in every(*question) if plan.backend is Backend.ATEN]
        opened = [plan for plan in found if Forward.OPEN in (plan.forward, plan.dx)]
        return opened or found

    monkeypatch.setattr(backends, "plans", asked)
    closed, right = [], elementwise.residual_expand
    watched = lambda *given: closed.append("y") or right(*given)  # noqa: E731
    monkeypatch.setattr(elementwise, "residual_expand", watched)
    before, bf16 = norm(384, torch.bfloat16, trains=False), torch.bfloat16
    sizes = {"attention": ((1152, 384), (384, 384)), "mlp": ((1536, 384), (384, 1536))}[half]
    pair = [matrix(*size, 16, dtype=bf16, w=False, bias=False) for size in sizes]
    x = torch.randn(4, 197, 384, dtype=bf16, requires_grad=True)
    runs = []
    for impl in (Impl.AUTO, Impl.ATEN):
        one, other = (each._replace(impl=impl) for each in pair)
        if half == "mlp":
            y = lora_mlp(x, one, other, norm=before, around=True)
        else:
            y = lora_attention(x, before, one, other, 6)
        runs.append([y.detach(), *torch.autograd.grad(y, leaves(x, pair), torch.ones_like(y) / 8)])
    assert closed
    for ours, plain in zip(*runs, strict=True):
        assert error(ours, plain.double()) < 2e-2


@pytest.mark.parametrize("one", ["erf", "scale"])
def test_an_ending_is_near_what_is_composed(one):
    x, w, bias, a, b = operands(torch.bfloat16)
    factor, residual = torch.randn(1152), torch.randn(4 * 197, 1152)
    epilogue = Epilogue("erf") if one == "erf" else Epilogue("none", factor, residual)
    given = (x.dtype, (*a, *b), NO_GRADIENT)
    runs = []
    with torch.no_grad():
        for impl in (Impl.TRITON, Impl.ATEN):
            frame = Frame((1.0, 0.5, 2.0), QKV, impl)
            runs.append(compute(x, w, bias, frame, *given, epilogue=epilogue).y)
    assert error(runs[0], runs[1].double()) < 2e-2
