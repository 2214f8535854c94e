"""Every wrong operand is named, with the values seen."""

import pytest
import torch

from fused_lora import lora_linear
from fused_lora.types import Span

X, W = torch.randn(5, 12), torch.randn(20, 12)
A, B = torch.randn(3, 12), torch.randn(20, 3)
WHOLE = (Span(0, 20, 3),)


def refuse(kind, message, x=X, w=W, bias=None, a=(A,), b=(B,), scales=(1.0,), spans=WHOLE, **more):
    with pytest.raises(kind, match=message):
        lora_linear(x, w, bias, list(a), list(b), scales, spans, **more)


def test_operands():
    refuse(ValueError, r"x \(5, 11\) must end in K = 12", x=torch.randn(5, 11))
    refuse(ValueError, r"x \(\) must end in K", x=torch.randn(()))
    refuse(ValueError, r"w must be \[N, K\], got shape \(20, 3, 4\)", w=torch.randn(20, 3, 4))
    refuse(ValueError, r"bias must be \[20\], got shape \(12,\)", bias=torch.randn(12))
    refuse(ValueError, r"a\[0\] must be \[3, 12\], got \(4, 12\)", a=[torch.randn(4, 12)])
    refuse(ValueError, r"b\[0\] must be \[20, 3\], got \(3, 20\)", b=[B.T])
    refuse(ValueError, "got 2 a, 1 b, 1 scales and 1 spans", a=(A, A))
    refuse(ValueError, "got 1 a, 1 b, 2 scales", scales=(1.0, 2.0))
    refuse(TypeError, "scales must be a sequence, one per adapter, got 2.0", scales=2.0)
    refuse(ValueError, "no gradient of it", scales=torch.ones(1, requires_grad=True))


def test_tensors_in_place_of_lists():
    with pytest.raises(ValueError, match="got 3 a, 20 b, 1 scales and 1 spans"):
        lora_linear(X, W, None, A, B, (1.0,))


def test_spans():
    refuse(ValueError, "leaves the 20 columns", spans=(Span(0, 21, 3),))
    refuse(ValueError, "overlaps another", a=(A, A), b=(B, B), scales=(1, 1),
           spans=(Span(0, 20, 3), Span(10, 20, 3)))  # fmt: skip
    refuse(ValueError, "is empty", spans=(Span(4, 4, 3),))
    refuse(ValueError, "ranks start at 1", spans=(Span(0, 20, 0),))
    refuse(ValueError, "no adapter given", a=(), b=(), scales=(), spans=())

    refuse(TypeError, r"spans must be fused_lora.types.Span, got \(\(0, 20, 3\),\)",
           spans=((0, 20, 3),))  # fmt: skip


def test_dtypes_and_devices():
    refuse(TypeError, "x is torch.bfloat16 and w is torch.float32", x=X.bfloat16())
    refuse(TypeError, "x is torch.int64", x=X.long(), w=W.long())
    eight = torch.float8_e4m3fn
    refuse(TypeError, "x is torch.float8_e4m3fn; .*are served", x=X.to(eight), w=W.to(eight))
    refuse(TypeError, r"a\[0\] is torch.int32", a=[A.int()])
    refuse(TypeError, "x is on cpu, w on meta", w=W.to("meta"))
    refuse(TypeError, r"x is on cpu, a\[0\] on meta", a=[A.to("meta")])


def test_impl(monkeypatch):
    refuse(ValueError, "'triton3' is not a valid Impl; expected one of", impl="triton3")
    monkeypatch.setenv("FUSED_LORA_IMPL", "fast")
    refuse(ValueError, "'fast' is not a valid Impl")
    monkeypatch.setenv("FUSED_LORA_IMPL", "reference")
    y = lora_linear(X, W, None, [A], [B], (1.0,))
    torch.testing.assert_close(y, X @ W.T + X @ A.T @ B.T)
