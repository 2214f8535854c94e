"""lora_merge: the backends agree with the reference, in both roundings."""

import pytest
import torch

from fused_lora.kernels.cuda import native
from fused_lora.ops.lora_merge import lora_merge
from fused_lora.testing.yardstick import error, judge
from fused_lora.types import Span

SPANS = (Span(0, 30, 5), Span(40, 77, 3))  # rows 30..39 are nobody's
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def operands(dtype, device="cpu"):
    make = lambda *shape: torch.randn(*shape, device=device)  # noqa: E731
    a = [make(span.rank, 61) for span in SPANS]
    b = [make(2 * span.width, span.rank)[::2] / 10 for span in SPANS]
    return make(77, 61).to(dtype), a, b, (1.0, 0.5), SPANS


@DTYPES
def test_nearest_is_the_float64_truth_rounded_once(dtype):
    w, a, b, scales, spans = operands(dtype)
    merged = lora_merge(w, a, b, scales, spans)
    truth = lora_merge(
        w.double(), [t.double() for t in a], [t.double() for t in b], scales, spans,
        impl="reference",
    )  # fmt: skip
    assert merged.dtype is dtype
    verdict = judge("w'", merged, truth.to(dtype), truth, dtype)
    assert verdict.passed, str(verdict)
    assert torch.equal(merged[30:40], w[30:40])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_draws_the_reference_bits(dtype):
    w, a, b, scales, spans = operands(dtype)
    arguments = (w, a, b, scales, spans, "stochastic", 11, 3)
    ours, reference = (lora_merge(*arguments, impl=impl) for impl in ("aten", "reference"))
    # fp32 sums may differ in their last bit and so land on the other side of a draw, rarely
    assert (ours != reference).float().mean() < 0.002
    assert not torch.equal(ours, lora_merge(w, a, b, scales, spans))


@pytest.mark.parametrize("impl", ["aten", "reference"])
def test_autocast_does_not_reach_the_sum(impl):
    w, a, b, scales, spans = operands(torch.float32)
    expected = lora_merge(w, a, b, scales, spans, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lora_merge(w, a, b, scales, spans, impl=impl), expected)


def test_cuda_says_why_it_cannot_serve():
    w, a, b, scales, spans = operands(torch.bfloat16)
    with pytest.raises(RuntimeError, match="impl='cuda' cannot serve: "):
        lora_merge(w, a, b, scales, spans, impl="cuda")


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_cuda(dtype, rounding):
    if reason := native.why_not():
        pytest.skip(reason)
    if rounding == "stochastic" and dtype is torch.float32:
        pytest.skip("nothing to round")
    arguments = (*operands(dtype, "cuda"), rounding, 11, 3)
    ours, reference = (lora_merge(*arguments, impl=impl) for impl in ("cuda", "reference"))
    assert error(ours, reference.double()) <= torch.finfo(dtype).eps
    assert torch.equal(ours, lora_merge(*arguments, impl="cuda"))
