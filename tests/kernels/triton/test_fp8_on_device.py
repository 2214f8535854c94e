"""A base in FP8 on a GPU that has matrix units for it: codes, products, gradients, replay."""

import pytest
import torch

pytest.importorskip("triton")

from fused_lora.kernels.aten import lora_linear_cases as aten
from fused_lora.kernels.triton import lora_linear_fp8 as kernels
from fused_lora.kernels.triton import lora_shrink
from fused_lora.kernels.triton.available import why_not_fp8
from fused_lora.kernels.triton.tiles import FP8
from fused_lora.ops.lora_linear_fp8 import lora_linear_fp8
from fused_lora.reference import lora_linear_fp8 as reference
from fused_lora.testing.yardstick import error, in_every_order, judge, judge_all
from fused_lora.types import Span
from tests.kernels.triton.cases import CASES, IDS, Case, adapters, build, lowered
from tests.kernels.triton.guards import fenced
from tests.kernels.triton.interpreted.test_lora_extended_fp8 import SHAPES, equation, same
from tests.ops.test_lora_linear_fp8 import equations, run

pytestmark = pytest.mark.gpu
HALVES = (torch.bfloat16, torch.float16)
DTYPE = pytest.mark.parametrize("dtype", HALVES, ids=str)
VIT = Case("ViT-B output projection", 8 * 197, 768, 768, (Span(0, 768, 16),))
LONG = Case("sums that a narrow adder would lose", 256, 8192, 256, (Span(0, 256, 16),))


@pytest.fixture(autouse=True)
def device(monkeypatch, tmp_path):
    """Every tensor of a test is made on the GPU."""
    found = torch.device("cuda", 0)
    if said := why_not_fp8(found, torch.bfloat16):
        pytest.skip(said)
    monkeypatch.setenv("FUSED_LORA_CACHE_DIR", str(tmp_path))
    with found:
        yield found


@DTYPE
@pytest.mark.parametrize("m, k", [*SHAPES, (8 * 197, 3072), (7, 16384)])
def test_codes_are_the_reference_s(m, k, dtype, monkeypatch):
    x = (torch.randn(m, k + 3) * torch.logspace(-6, 4, m)[:, None]).to(dtype)[:, :k]
    with fenced(monkeypatch):
        found = kernels.quantise(x)
    assert same(found, reference.quantise(x))


@DTYPE
@pytest.mark.parametrize("case", [*CASES, VIT, LONG], ids=[*IDS, VIT.why, LONG.why])
def test_every_tile(case, dtype, monkeypatch):
    p = build(case, dtype, torch.float32)
    if case is LONG:
        p.x, p.w = p.x.abs(), p.w.abs()
    x, w, group = reference.quantise(p.x), reference.quantise(p.w), adapters(p)
    h = lora_shrink.shrink(p.x, group)
    plain = in_every_order(lambda: equation(lowered(p, dtype)))
    truth = equation(p.double())
    for tile in FP8:
        with fenced(monkeypatch):
            y = kernels.forward_extended_fp8(x, w, p.bias, group, h, tile)
        verdict = judge(f"{tile}", y, plain, truth, dtype)
        assert verdict.passed, str(verdict)
        assert torch.equal(y, kernels.forward_extended_fp8(x, w, p.bias, group, h, tile))


@DTYPE
@pytest.mark.parametrize("impl", ["auto", "aten", "triton"])
def test_values_and_gradients(impl, dtype):
    p = build(VIT, dtype, torch.float32)
    plain = in_every_order(lambda: dict(equations(lowered(p, dtype))))
    verdict = judge_all(dict(run(p, impl)), plain, dict(equations(p.double())), dtype)
    assert verdict.passed, str(verdict)


def test_the_library_s_product_by_rows():
    p = build(VIT, torch.bfloat16, torch.float32)
    w = reference.quantise(p.w)
    if not aten.scales_rows(p.x, w.codes):
        pytest.skip("this torch has none for this device")
    y, _ = aten.forward_fp8(p.x, w, p.bias, adapters(p))
    assert error(y, equation(p.double())) < 2.0**-7


def test_compiled_and_captured():
    p = build(VIT, torch.bfloat16, torch.float32)
    w = reference.quantise(p.w)
    call = lambda x: lora_linear_fp8(x, w, p.bias, p.a, p.b, p.scales, p.spans)  # noqa: E731
    with torch.no_grad():
        eager, graph = call(p.x), torch.cuda.CUDAGraph()
        assert torch.equal(torch.compile(call, fullgraph=True)(p.x), eager)
        with torch.cuda.graph(graph):
            captured = call(p.x)
        captured.zero_()
        graph.replay()
    assert torch.equal(captured, eager)
