"""The Hopper product on its way from impl="cuda" to a parameter, over an emulated block."""

from __future__ import annotations

from itertools import product
from types import ModuleType

import pytest
import torch

from fused_lora import lora_linear
from fused_lora.kernels.cuda import lora_extended, native
from fused_lora.kernels.cuda import lora_linear as room
from fused_lora.kernels.cuda.native import Chip
from fused_lora.ops import backends, planning
from fused_lora.plan.strategies import PRODUCT_GROUPS
from fused_lora.programs import run
from fused_lora.testing.yardstick import in_every_order, judge_all
from fused_lora.types import Backend, Gradient, Impl, Needs, Span
from fused_lora.verify import kernel_registry, launch_checks

from .serving import Served, one_element, served  # noqa: F401
from .test_dispatch import BF16, CPU, SPANS, Layer, keeps_the_yardstick, plan

TWO = (Span(0, 40, 70),)  # more ranks than the compiled gradients take


@pytest.fixture(autouse=True)
def as_written(monkeypatch):
    """What is watched here are the calls themselves."""
    monkeypatch.setenv("FUSED_LORA_PROGRAMS", "0")
    run.forget()


@pytest.fixture
def hopper(served: Served, monkeypatch: pytest.MonkeyPatch) -> list[str]:  # noqa: F811
    """The names of the products that ran, on what passes for an H100."""
    ran: list[str] = []
    monkeypatch.setattr(backends, "_product", lambda device: None)
    monkeypatch.setattr(launch_checks, "PRODUCTS", launch_checks.PRODUCTS[1:])
    for name in ("forward", "input_grad"):
        watch(monkeypatch, name, ran)
    return ran


def watch(monkeypatch: pytest.MonkeyPatch, name: str, ran: list[str]) -> None:
    right = getattr(lora_extended, name)

    def watched(*args, **options):
        ran.append(name)
        return right(*args, **options)

    monkeypatch.setattr(lora_extended, name, watched)


def test_it_serves_where_it_is_asked_for_once_checked(hopper: list[str]) -> None:
    assert plan().backend is not Backend.CUDA
    assert not hopper
    chosen = plan(Impl.CUDA)
    assert str(chosen).startswith("cuda:extended/extended/cuda:rank/")
    checks = len(hopper)
    assert checks > 0
    keeps_the_yardstick(Layer(), "cuda")
    assert hopper[checks:] == ["forward", "input_grad"]


@pytest.mark.parametrize("needs", [Needs(), Needs(w=True), Needs(a=False, b=False)], ids=str)
def test_beyond_the_compiled_gradients(hopper: list[str], needs: Needs) -> None:
    """All ranks, by the library's gradients: da and db, with dw, and none of them."""
    question = (21, 72, 40, TWO, BF16, True, needs, CPU)
    chosen = planning.plan_for(*question, impl=Impl.CUDA)
    assert chosen.backend is Backend.CUDA and chosen.grads_by is None
    layer = Layer(spans=TWO)
    leaves = {"x": layer.x, "w": layer.w, "a": layer.a[0], "b": layer.b[0]}
    wanted = [name for name in leaves if getattr(needs, name)]
    plain = in_every_order(lambda: grads(layer, "reference", None, leaves, wanted))
    truth = grads(layer, "reference", torch.float64, leaves, wanted)
    verdict = judge_all(grads(layer, "cuda", None, leaves, wanted), plain, truth, BF16)
    assert verdict.passed, verdict


def grads(layer: Layer, impl: str, dtype, leaves, wanted):
    """Of the leaves in ``wanted``, computed in ``dtype`` or in each one's own."""
    own = {name: t.to(dtype or t.dtype).clone() for name, t in leaves.items()}
    for name in wanted:
        own[name].requires_grad_()
    bias = layer.bias.to(dtype or BF16)
    ab = ([own["a"]], [own["b"]])
    y = lora_linear(own["x"], own["w"], bias, *ab, layer.scales[:1], TWO, impl=impl)
    return torch.autograd.grad(y, [own[name] for name in wanted], layer.dy.to(y.dtype))


@pytest.mark.parametrize("gradient", [Gradient.RANK, Gradient.FULL])
def test_every_gradient_of_the_room(hopper: list[str], gradient: Gradient) -> None:
    """Each plan that the room may be given leaves the same as the library's."""
    from fused_lora.kernels.aten import lora_linear as aten
    from fused_lora.kernels.interface import Adapters
    from fused_lora.plan.strategies import by_library, candidates

    layer = Layer(spans=TWO)
    adapters = Adapters(layer.a, layer.b, layer.scales[:1], TWO)
    question = planning.problem(21, 72, 40, TWO, BF16, True, Needs())
    plans = [p for p in candidates(question, (), compiled=True) if p.gradient is gradient]
    assert plans
    for one in plans:
        y, kept = room.forward(layer.x, layer.w, layer.bias, adapters, one)
        other = by_library(one)
        y2, kept2 = aten.forward(layer.x, layer.w, layer.bias, adapters, other)
        assert (kept is None) == (kept2 is None)
        ours = room.backward(layer.dy, layer.x, kept, layer.w, adapters, Needs(), one)
        theirs = aten.backward(layer.dy, layer.x, kept2, layer.w, adapters, Needs(), other)
        pairs = [
            (y, y2),
            (ours.x, theirs.x),
            *zip(ours.a + ours.b, theirs.a + theirs.b, strict=True),
        ]
        for mine, its in pairs:
            torch.testing.assert_close(mine, its, rtol=2**-6, atol=2**-6)


def test_without_gradients(hopper: list[str]) -> None:
    layer, none = Layer(), Needs(x=False, a=False, b=False)
    assert plan(Impl.CUDA, none).backend is Backend.CUDA
    hopper.clear()
    with torch.no_grad():
        ab = (layer.a, layer.b, layer.scales, SPANS)
        y = lora_linear(layer.x, layer.w, layer.bias, *ab, impl="cuda")
        truth = lora_linear(layer.x.double(), layer.w.double(), layer.bias.double(),
                            [a.double() for a in layer.a], [b.double() for b in layer.b],
                            layer.scales, SPANS, impl="reference")  # fmt: skip
    assert hopper == ["forward"]
    assert (y.double() - truth).norm() < 2**-8 * truth.norm()


def test_a_broken_one_is_caught_and_never_serves(
    hopper: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = lora_extended.forward
    monkeypatch.setattr(
        lora_extended, "forward", lambda *a, **o: (r := right(*a, **o))._replace(y=one_element(r.y))
    )
    with (
        pytest.warns(RuntimeWarning, match=r"cuda lora_linear \(64 x 128\) in bfloat16 .* over"),
        pytest.raises(RuntimeError, match="impl='cuda' cannot serve: lora_linear: error .* over"),
    ):
        plan(Impl.CUDA)
    assert plan().backend is not Backend.CUDA


def test_where_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "why_not_on", lambda device: None)
    monkeypatch.setattr(native, "archs", lambda: ["80-real", "90-real"])
    monkeypatch.setattr(Chip, "of", staticmethod(lambda device: Chip(90, 132)))
    assert "compiled without sm_90a: the module has code for 80-real, 90-real" in str(
        room.why_not(CPU)
    )
    monkeypatch.setattr(native, "archs", lambda: ["80-real", "90a-real"])
    assert room.why_not(CPU) is None
    monkeypatch.setattr(Chip, "of", staticmethod(lambda device: Chip(120, 132)))
    assert "this is sm_120" in str(room.why_not(CPU))


def test_a_self_test_lists_every_tile(hopper: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "why_not_compiled", lambda: None)
    found = [one.subject for one in kernel_registry.compiled_products("bfloat16", CPU)]
    listed = ["128 x 128", "128 x 192", "128 x 256", "64 x 128", "64 x 256"]
    listed += ["128 x 128, 2 blocks", "128 x 192, 2 blocks", "128 x 256, 2 blocks"]
    listed += ["64 x 256, ping-pong", "64 x 256, 2 blocks, ping-pong"]
    kernels = ("lora_linear", "lora_linear_gelu", "lora_linear_scale")
    assert [(one.kernel, one.configuration) for one in found] == list(product(kernels, listed))
    for m, n in ((197, 384), (25216, 2304)):
        question = planning.problem(m, 768, n, (Span(0, n, 16),), BF16, True, Needs())
        monkeypatch.setattr(Chip, "of", staticmethod(lambda device: Chip(90, 132)))
        tiles = room.tiles(question, plan(Impl.CUDA), BF16, CPU)
        assert {str(tile) for tile in tiles} <= set(listed[:5])


@pytest.mark.parametrize(
    "tile, tiles", [(lora_extended.CLUSTERS[0], 20), (lora_extended.PING_PONG[1], 18)], ids=str
)
@pytest.mark.parametrize("behind", ["", "gelu", "scale"])
def test_the_check_of_a_cluster_runs_clusters(
    host: ModuleType, monkeypatch: pytest.MonkeyPatch, behind: str, tile, tiles: int
) -> None:
    """Several tiles each, of consumers in ping-pong too; of few rows one block by itself."""
    monkeypatch.setattr(native, "load", lambda: host)
    monkeypatch.setattr(Chip, "of", staticmethod(lambda device: Chip(90, 132)))
    right, seen = lora_extended._plan, set()

    def watched(*args, **options):
        launched = right(*args, **options)
        seen.add((launched.cluster, launched.blocks, launched.tiles))
        return launched

    monkeypatch.setattr(lora_extended, "_plan", watched)
    found = kernel_registry.of_compiled_product(tile, "bfloat16", behind).check(CPU)
    assert found.passed, found
    assert seen == {(1, 1, 1), (2, 4, tiles)}


def test_the_plan_knows_how_many_adapters_it_takes(host: ModuleType) -> None:
    assert host.linear_most_groups == PRODUCT_GROUPS
