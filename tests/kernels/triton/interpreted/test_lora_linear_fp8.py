"""lora_linear_fp8 by Triton, end to end: checked before it serves, right when it does."""

import pytest
import torch

from fused_lora.kernels.triton import lora_linear_fp8 as kernels
from fused_lora.ops import lora_linear_fp8 as module
from fused_lora.ops.lora_linear_fp8 import lora_linear_fp8
from fused_lora.reference.lora_linear_fp8 import quantise
from fused_lora.testing.yardstick import in_every_order, judge_all
from fused_lora.types import Span
from fused_lora.verify import check
from fused_lora.verify.check import Shape
from tests.kernels.triton.cases import CASES, build, lowered
from tests.kernels.triton.interpreted.serving import serving  # noqa: F401
from tests.ops.test_lora_linear_fp8 import equations, run

QKV = CASES[3]


@pytest.fixture
def capable(serving):  # noqa: F811
    """Triton takes this CPU for a chip with FP8 matrix units."""
    serving.setattr(module, "_why_not_on", lambda device, dtype: None)
    small = Shape(40, 32, 48, (Span(0, 48, 5),), True, True, 0)
    for name in ("SHAPES", "ALIGNED"):
        serving.setattr(check, name, (small,))
    return serving


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_values_and_gradients(capable, dtype):
    launched = []
    right = kernels.forward_extended_fp8
    capable.setattr(kernels, "forward_extended_fp8", lambda *a: launched.append(1) or right(*a))
    p = build(QKV, dtype, torch.float32)
    plain = in_every_order(lambda: dict(equations(lowered(p, dtype))))
    verdict = judge_all(dict(run(p)), plain, dict(equations(p.double())), dtype)
    assert verdict.passed, str(verdict)
    assert launched


def test_a_broken_kernel_is_caught_and_the_library_serves(capable):
    capable.setenv("FUSED_LORA_VERIFY", "first")
    right = kernels.forward_extended_fp8

    def broken(*args):
        y = right(*args)
        y[-1, -1] = 0.0
        return y

    capable.setattr(kernels, "forward_extended_fp8", broken)
    p = build(QKV, torch.bfloat16, torch.float32)
    call = lambda impl: lora_linear_fp8(  # noqa: E731
        p.x, quantise(p.w), p.bias, p.a, p.b, p.scales, p.spans, impl=impl
    )
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="does not use triton extended_fp8"):
        assert torch.equal(call("auto"), call("aten"))
    with torch.no_grad(), pytest.raises(RuntimeError, match="impl='triton' cannot serve: .* over"):
        call("triton")


def test_rows_too_long_for_registers_are_the_library_s(capable):
    like = torch.empty(0, dtype=torch.bfloat16)
    assert module.why_not_triton(4, 8, 16384, 2, like) is None
    said = module.why_not_triton(4, 8, 16385, 2, like)
    assert said == "it holds rows of up to 16384 in registers, and x has 16385 columns"
