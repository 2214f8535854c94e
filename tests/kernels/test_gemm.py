"""GEMM forms on the shapes library calls get wrong: single rows and columns of wider tensors."""

import itertools
from functools import partial

import pytest
import torch

from fused_lora.kernels.gemm import accumulate, dense, outer, product, thin_rows
from fused_lora.testing.yardstick import in_every_order, judge

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
SIZES = list(itertools.product((1, 3, 90), (1, 19, 655), (1, 2, 17)))  # 1 and 90, 655: torch 2.9


def strided(rows, columns, dtype, transposed):
    """[rows, columns] inside a larger tensor."""
    if transposed:
        return strided(columns, rows, dtype, False).t()
    return torch.randn(rows + 2, columns + 5).to(dtype)[:rows, :columns]


@DTYPES
@pytest.mark.parametrize("transposed", list(itertools.product((False, True), repeat=2)))
@pytest.mark.parametrize("beta", [0, 1])
def test_accumulate_into_a_block_touches_nothing_else(dtype, transposed, beta):
    for m, k, n in SIZES:
        p, q = strided(m, k, dtype, transposed[0]), strided(k, n, dtype, transposed[1])
        wide = torch.randn(m, n + 4).to(dtype)
        run = lambda y, p, q: beta * y + 0.5 * (p @ q)  # noqa: E731
        truth = run(wide[:, :n].double(), p.double(), q.double())
        plain = in_every_order(partial(run, wide[:, :n].clone(), p.contiguous(), q.contiguous()))
        beside = wide[:, n:].clone()
        if not beta:
            wide[:, :n] = torch.nan
        accumulate(wide[:, :n], p, q, 0.5, beta)
        verdict = judge(f"{m} x {k} x {n}", wide[:, :n], plain, truth, dtype)
        assert verdict.passed, str(verdict)
        assert torch.equal(wide[:, n:], beside)


@DTYPES
def test_outer_and_product(dtype):
    for m, k, n in SIZES:
        p, q = strided(m, k, dtype, False), strided(m, n, dtype, False)
        truth = 2 * p.double().T @ q.double()
        plain = in_every_order(lambda p=p, q=q: 2 * (p.t().contiguous() @ q.contiguous()))
        for ours in (outer(p, q, 2.0, torch.float32), product(p.t(), q, 2.0, dtype)):
            verdict = judge(f"{m} x {k} x {n}", ours, plain, truth, dtype)
            assert verdict.passed, str(verdict)


def test_copies_only_what_must_be():
    square, column = torch.randn(8, 8)[:4, :4], torch.randn(8, 8)[:, :1]
    assert dense(square) is square
    assert dense(column).is_contiguous()
    assert thin_rows(torch.randn(30, 4), 30).stride() == (1, 30)
    wide = torch.randn(30, 16)
    assert thin_rows(wide, 30) is wide and thin_rows(wide[:, :4], 5).stride() == (16, 1)
