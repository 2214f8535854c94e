"""An MLP whose da of fc2 and db of fc1 are formed in the tiles of dx, beside compiled gradients."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from fused_lora.kernels.cuda import native
from fused_lora.kernels.cuda.native import Chip
from fused_lora.kernels.triton import lora_grad, lora_grad_rank, tiles
from fused_lora.kernels.triton.border import Packed
from fused_lora.kernels.triton.launches import tile_of
from fused_lora.kernels.triton.tiles import Tile
from fused_lora.ops import backends, elementwise, lora_grad_backends, measured
from fused_lora.testing.yardstick import in_every_order, judge_all
from fused_lora.types import Backend, Impl, Span
from fused_lora.verify import kernel_registry, launch_checks
from fused_lora.verify.check import Shape
from tests.kernels.cuda.conftest import build_host
from tests.kernels.cuda.serving import forget, narrow
from tests.kernels.triton.interpreted.serving import serving, small_tiles  # noqa: F401
from tests.kernels.triton.interpreted.test_chains import (
    BF16,
    NAMES,
    operands,
    plain,
    run,
    within,
)

ROOT = Path(__file__).parents[4]
D, H = 64, 128  # a tile's depth and its columns
SMALL = Tile(32, 64, 32, 2, 4)


@pytest.fixture(scope="module")
def host():
    """The native sources on the CPU."""
    path = build_host(ROOT / ".pytest_cache" / "d" / "native")
    spec = importlib.util.spec_from_file_location("_native", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def formed(serving, small_tiles, host) -> list[tuple[int, ...]]:  # noqa: F811
    """Sizes of du whose tiles were operands of gradients, where both rooms serve."""
    serving.setattr(native, "load", lambda: host)
    serving.setattr(native, "why_not", lambda device=None: None)
    serving.setattr(Chip, "of", staticmethod(lambda device: Chip(90, 3)))
    serving.setattr(lora_grad_backends, "why_not_on", lambda device: None)
    for name, value in {
        "TRITON_EFFICIENCY": 1e6,
        "CUDA_EFFICIENCY": 1e6,
        "TRITON_LAUNCH_CALLS": 0.0,
        "CUDA_LAUNCH_CALLS": 0.0,
        "GRADIENT_CALLS": 0.0,
        "MERGE_EFFICIENCY": 1e-9,
        "SLICES": 0,
    }.items():
        serving.setattr(f"fused_lora.plan.cost_kernels.{name}", value)
    estimates(serving, apart=2.0, together=1.0)
    ran, right = [], lora_grad.input_grad_and_slices

    def watched(*given, **how):
        found = right(*given, **how)
        ran.append(tuple(found.du.shape))
        return found

    serving.setattr(lora_grad, "input_grad_and_slices", watched)
    forget()
    return ran


def estimates(monkeypatch, apart: float, together: float) -> None:
    """Whatever the sizes."""
    both = lambda *question: (apart, together)  # noqa: E731
    monkeypatch.setattr("fused_lora.ops.planning.together_us", both)


def of(dtype=BF16, **trains):
    return operands(dtype, (2, 35), (D, H), **trains)


@pytest.mark.parametrize("recompute", ["none", "elementwise"])
@pytest.mark.parametrize("programs", [True, False])
@pytest.mark.parametrize("kind", ["erf", "tanh"])
def test_every_gradient(formed, monkeypatch, kind, programs, recompute):
    monkeypatch.setenv("FUSED_LORA_PROGRAMS", str(int(programs)))
    given = of()
    for _ in range(2):  # a program's launches are bound from its second run on
        ours = run(given, BF16, recompute, NAMES[kind])
        within(ours, given, BF16, NAMES[kind])
    assert set(formed) == {(70, H)}


def test_biases_that_train(formed):
    given = of(bias=True)
    within(run(given, BF16, "elementwise"), given, BF16)
    assert set(formed) == {(70, H)}


def test_an_fp32_stream_under_autocast(formed):
    """dy of 32 bits is cast before its gradients are formed."""
    given = of(torch.float32)
    with torch.autocast("cpu", BF16):
        ours = run(given, torch.float32, "elementwise")
        assert set(formed) == {(70, H)}
        others = in_every_order(lambda: run(given, torch.float32, "elementwise", impl=Impl.ATEN))
    verdict = judge_all(ours, others, plain(given, torch.float64), BF16)
    assert verdict.passed, str(verdict)


def test_the_bits_are_those_of_gradients_apart(formed, monkeypatch):
    """dh, du and dx to the bit; sums are of other slices."""
    given = of()
    once, again = (run(given, BF16, "elementwise") for _ in range(2))
    assert formed and all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    formed.clear()
    estimates(monkeypatch, apart=1.0, together=2.0)
    forget()
    apart = run(given, BF16, "elementwise")
    assert not formed
    y, dx = 0, 1
    assert torch.equal(once[y], apart[y])
    torch.testing.assert_close(once[dx], apart[dx], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("programs", [True, False])
@pytest.mark.parametrize("joint", [True, False])
def test_the_norm_is_not_made_again(formed, monkeypatch, programs, joint):
    """Gradients of fc1 form it as they read its input, to the bit as Triton's kernel of it does."""
    monkeypatch.setenv("FUSED_LORA_PROGRAMS", str(int(programs)))
    estimates(monkeypatch, apart=1.0 + joint, together=1.5)
    every = backends.plans
    asked = lambda *how: [p for p in every(*how) if p.grads_by is Backend.CUDA]  # noqa: E731
    monkeypatch.setattr(backends, "plans", asked)
    made, given = [], of()
    for name in ("layer_norm_forward", "layer_norm_shrink", "layer_norm_rebuild"):
        right = getattr(elementwise, name)

        def watched(*how, right=right, name=name, **more):
            made.append(name)
            return right(*how, **more)

        monkeypatch.setattr(elementwise, name, watched)
    forget()
    once = run(given, BF16, "elementwise")
    assert len(made) == 1 and bool(formed) == joint
    monkeypatch.setattr("fused_lora.ops.chain.linear.why_not_normed", lambda *_: "not now")
    forget()
    again = run(given, BF16, "elementwise")
    assert len(made) == 3
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize(
    "fault", ["gemm", "fc1 without b", "fc2 without a", "wide", "w of fc2", "fp32", "ranks"]
)
def test_where_it_is_not_asked_for(formed, monkeypatch, fault):
    """Each is served as before."""
    dtype = torch.float32 if fault == "fp32" else BF16
    given = of(dtype, w=fault == "w of fc2")
    if fault == "wide":
        given = operands(dtype, (2, 35), (D, H + 8))
    if fault == "ranks":
        monkeypatch.setattr(tiles, "MOST_GRAD_RANKS", 4)
    x, norm, fc1, fc2 = given
    for half in fc1.b if fault == "fc1 without b" else fc2.a if fault == "fc2 without a" else ():
        half.requires_grad_(False)
    recompute = "gemm" if fault == "gemm" else "elementwise"
    within(run(given, dtype, recompute), given, dtype)
    assert not formed


def test_a_broken_kernel_leaves_gradients_apart(formed, monkeypatch):
    small = Shape(40, 32, 48, (Span(0, 48, 5),), True, True, 0)
    for name in ("SHAPES", "ALIGNED"):
        monkeypatch.setattr(kernel_registry, name, (small,))
    monkeypatch.setattr(lora_grad_backends, "examples", narrow)
    for name, value in {"ROWS": 21, "WHOLE": launch_checks.WHOLE[1:]}.items():
        monkeypatch.setattr(launch_checks, name, value)
    monkeypatch.setenv("FUSED_LORA_VERIFY", "first")
    right = lora_grad.input_grad_and_slices

    def broken(*given, **how):
        found = right(*given, **how)
        found.b[:, 3, 0] = 0.0
        return found

    monkeypatch.setattr(lora_grad, "input_grad_and_slices", broken)
    given = of()
    with pytest.warns(RuntimeWarning, match="does not use triton extended_grads .*error .* over"):
        ours = run(given, BF16, "elementwise")
    formed.clear()
    within(ours, given, BF16)
    within(run(given, BF16, "elementwise"), given, BF16)
    assert not formed


def test_both_ways_are_timed_once_and_kept(formed, monkeypatch):
    for name in ("ROUNDS_CPU", "MOST_CPU", "WARM_CPU"):
        monkeypatch.setattr(measured, name, 1)  # an interpreter is slow
    monkeypatch.setattr(measured, "SAMPLE_US", 1.0)
    asked, raced, right = measured.together, [], measured._race_together

    def together(*question):
        with monkeypatch.context() as now:
            now.setenv("FUSED_LORA_PLAN", "measure")
            return asked(*question)

    def race(*given):
        before = torch.random.get_rng_state()
        found = right(*given)
        assert torch.equal(before, torch.random.get_rng_state())
        raced.append(found)
        return found

    monkeypatch.setattr(measured, "together", together)
    monkeypatch.setattr(measured, "_race_together", race)
    given = of()
    with measured.rehearsed() as later:  # as ``prepare`` looks at a step
        run(given, BF16, "elementwise")
    ((question, both, device),) = (one for one in later if isinstance(one[1], measured.Together))
    assert not raced and measured.rehearse(question, both, device) == str(both)
    forget()
    within(run(given, BF16, "elementwise"), given, BF16)
    (found,) = raced
    assert set(found) == {"apart", "together"} and min(found.values()) > 0
    forget()
    formed.clear()
    within(run(given, BF16, "elementwise"), given, BF16)
    assert len(raced) == 1 and bool(formed) == (found["together"] < found["apart"])
    kept = measured.path().read_text()
    assert '"together"' in kept and '"apart"' in kept


def test_slices_add_up_whatever_their_number(monkeypatch):
    """Of one and of many, tails and empty rows included."""
    torch.manual_seed(0)
    draw = lambda *shape: torch.randn(shape).to(BF16)  # noqa: E731
    for m in (0, 1, 70):
        dy, w, dh, u, h = draw(m, D), draw(D, H), draw(m, 5), draw(m, H), draw(m, 3)
        a = Packed(draw(5, H), draw(5, D), H, (1.0,), (Span(0, D, 5),))
        found = []
        for processors in (1, 2, 64):
            monkeypatch.setattr(lora_grad_rank, "multiprocessors", lambda device, n=processors: n)
            made = lora_grad.input_grad_and_slices(dy, w, a, dh, "erf", u, h, SMALL)
            found.append((made.du, made.a.sum(0), made.b.sum(0)))
            assert made.a.shape[1:] == (H, 16) and not made.a[:, :, 5:].any()
        for other in found[1:]:
            assert torch.equal(found[0][0], other[0])
            for mine, its in zip(found[0][1:], other[1:], strict=True):
                torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-3)


def test_what_it_cannot_take_is_refused():
    z = lambda *shape: torch.zeros(shape, dtype=BF16)  # noqa: E731
    a = Packed(z(5, 96), z(5, D), 96, (1.0,), (Span(0, D, 5),))
    with pytest.raises(AssertionError, match="96"):
        lora_grad.input_grad_and_slices(z(8, D), z(D, 96), a, z(8, 5), "erf", z(8, 96), z(8, 3))


def test_the_tile_is_one_of_its_own(serving):  # noqa: F811
    cpu = torch.device("cpu")
    tile = tile_of("extended_grads", 70, H, D, BF16, cpu)
    assert tile in tiles.EXTENDED_GRADS and tiles.holds_gradients(H, D, tiles.MOST_GRAD_RANKS)
    assert not tiles.holds_gradients(H + 64, D, 5) and not tiles.holds_gradients(H, D + 32, 5)
    assert not tiles.holds_gradients(H, D, tiles.MOST_GRAD_RANKS + 1)
