"""The interpreter is put right: casts round to nearest even, products are of values, not bits."""

import torch
import triton
import triton.language as tl

F32, BF16, E4M3 = torch.float32, torch.bfloat16, torch.float8_e4m3fn


@triton.jit
def _cast(x, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


@triton.jit
def _dot(x, w, out, PRECISION: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    at = i[:, None] * SIZE + i[None, :]
    product = tl.dot(tl.load(x + at), tl.load(w + at), input_precision=PRECISION)
    tl.store(out + at, product)


def product(x, w, precision="ieee"):
    out = torch.full((32, 32), torch.nan)
    _dot[(1,)](x, w, out, PRECISION=precision, SIZE=32)
    return out


def test_casts_to_bf16_round_to_nearest_even():
    special = [1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.4e38, 1e-40, torch.inf, torch.nan, 0.0]
    x = torch.cat((torch.tensor(special), torch.randn(120)))
    out = torch.empty(128, dtype=BF16)
    _cast[(1,)](x, out, SIZE=128)
    torch.testing.assert_close(out, x.to(BF16), rtol=0, atol=0, equal_nan=True)


def test_casts_from_bf16_are_exact():
    x = torch.randn(128).to(BF16)
    for dtype in (F32, torch.float16):
        out = torch.empty(128, dtype=dtype)
        _cast[(1,)](x, out, SIZE=128)
        assert torch.equal(out, x.to(dtype))


def test_casts_to_e4m3_round_to_nearest_even_and_saturate():
    grid = torch.arange(127, dtype=torch.uint8).view(E4M3).float()
    halves = (grid[1:] + grid[:-1]) / 2
    special = torch.tensor([449.0, 1e4, torch.inf, -torch.inf, torch.nan, -0.0])
    x = torch.cat((grid, -grid, halves, special, torch.randn(126)))
    out = torch.empty(512, dtype=E4M3)
    _cast[(1,)](x, out, SIZE=512)
    torch.testing.assert_close(out.float(), x.clamp(-448, 448).to(E4M3).float(), equal_nan=True)


def test_casts_from_e4m3_are_exact():
    x = torch.arange(256, dtype=torch.uint8).view(E4M3)
    for dtype in (F32, BF16, torch.float16):
        out = torch.empty(256, dtype=dtype)
        _cast[(1,)](x, out, SIZE=256)
        torch.testing.assert_close(out, x.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_dot_multiplies_values():
    for dtype in (BF16, torch.float16, E4M3):
        x, w = torch.randn(32, 32).to(dtype), torch.randn(32, 32).to(dtype)
        torch.testing.assert_close(product(x, w), x.float() @ w.float(), rtol=1e-5, atol=1e-5)


def test_tf32_loses_what_a_matrix_unit_does_not_read():
    x, eye = torch.full((32, 32), 1 + 2**-11), torch.eye(32)
    assert torch.equal(product(x, eye), x)
    assert torch.equal(product(x, eye, "tf32"), torch.ones(32, 32))
