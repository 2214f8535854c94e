"""Attention whose backward is given out and log-sum-exp: whose turn it is, and what goes where."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from fused_lora.kernels.aten import attention
from fused_lora.ops.chain import stages as stage
from fused_lora.ops.chain.stage import StageNeeds
from fused_lora.testing.yardstick import judge

ON_GPU = [key for key in attention.KERNELS if key[0] == "cuda"]
each_on_gpu = pytest.mark.parametrize("key", ON_GPU, ids=lambda key: SDPBackend(key[1]).name)
ASKED = StageNeeds(True, (), True, None)


@pytest.fixture
def choice(monkeypatch):
    """What torch would choose, without a GPU to ask."""
    return lambda key: monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_: key[1])


class TestWithoutAGpu:
    @each_on_gpu
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_the_arguments_fit_the_schema(self, key, dtype, choice):
        """As fake tensors on a device that is not there: shapes, dtypes, order of arguments."""
        choice(key)
        batch, tokens, heads, depth = 3, 17, 2, 16
        with FakeTensorMode():
            qkv = torch.empty(batch * tokens, 3 * heads * depth, device="cuda", dtype=dtype)
            attend = stage.Attention(heads, tokens, key)
            run = attend.forward((qkv,), (), ASKED)
            (out,) = run.out
            assert out.shape == (batch * tokens, heads * depth) and out.dtype is dtype
            same = run.extra[0].untyped_storage()._cdata == out.untyped_storage()._cdata
            assert same, "out is kept twice"
            lse = run.extra[1]
            assert lse.dtype is torch.float32 and lse.shape[:2] == (batch, heads)
            found = attend.backward((out,), (qkv,), run._replace(out=()), (), ASKED)
            (dqkv,) = found.x
            assert dqkv.shape == qkv.shape and dqkv.dtype is dtype and found.own == ()

    @each_on_gpu
    @pytest.mark.parametrize("depth, served", [(64, True), (128, True), (36, False), (192, False)])
    def test_heads_that_torch_would_pad_are_left_to_it(self, key, depth, served, choice):
        choice(key)
        with FakeTensorMode():
            q = torch.empty(1, 2, 5, depth, device="cuda", dtype=torch.bfloat16)
            assert attention.serves(q, q, q) == (key if served else None)

    def test_what_is_not_known_is_not_served(self, choice):
        q = torch.empty(1, 2, 5, 8)
        for backend in (SDPBackend.MATH, SDPBackend.CUDNN_ATTENTION):
            choice(("cpu", backend.value))
            assert attention.serves(q, q, q) is None

    def test_the_math_backend_runs_once_more(self):
        qkv = torch.randn(10, 24)
        with sdpa_kernel(SDPBackend.MATH):
            run = stage.Attention(2, 5).forward((qkv,), (), ASKED)
        assert run.extra == () and run.note is None


def outcomes(key, q, k, v, d_out):
    """out and three gradients: ours, and autograd's in the same dtype and in float64."""
    done = attention.forward(key, (q, k, v))
    ours = (done.out, *attention.backward(key, d_out, (q, k, v), done))

    def plain(dtype):
        given = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
        out = scaled_dot_product_attention(*given)
        return (out, *torch.autograd.grad(out, given, d_out.to(dtype)))

    return ours, plain(q.dtype), plain(torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_on_the_cpu(dtype):
    q, k, v, d_out = torch.randn(4, 2, 3, 37, 16).to(dtype)
    key = attention.serves(q, k, v)
    assert key == ("cpu", SDPBackend.FLASH_ATTENTION.value)
    for i, each in enumerate(zip(*outcomes(key, q, k, v, d_out), strict=True)):
        verdict = judge(f"quantity {i}", *(t.detach() for t in each), dtype)
        assert verdict.passed, verdict


@pytest.mark.gpu
@each_on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_the_gpu(key, dtype):
    if dtype is torch.float32 and key[1] != SDPBackend.EFFICIENT_ATTENTION.value:
        pytest.skip("flash and cuDNN attention compute in 16 bits")
    qkv = torch.randn(2, 197, 3 * 6 * 64, device="cuda", dtype=dtype)
    q, k, v = stage.split(qkv, 6)
    d_out = torch.randn(2, 197, 6, 64, device="cuda", dtype=dtype).transpose(1, 2)
    with sdpa_kernel(SDPBackend(key[1])):
        assert attention.serves(q, k, v) == key
    ours, theirs, truth = outcomes(key, q, k, v, d_out)
    assert ours[0].transpose(1, 2).is_contiguous()  # rows of it are a view, not kept twice
    for i, each in enumerate(zip(ours, theirs, truth, strict=True)):
        verdict = judge(f"quantity {i}", *(t.detach() for t in each), dtype)
        assert verdict.passed, verdict
