"""Rank gradients beyond parity: into an owner's sub-block, and added to what it holds."""

import pytest
import torch

from fused_lora.kernels.triton.lora_grad_rank import a_grads, b_grads
from tests.kernels.triton.cases import CASES, GRAD_TILE, adapters, build

QKV = CASES[3]


def operands(dtype=torch.float32):
    p = build(QKV, dtype, torch.float32)
    rank = sum(span.rank for span in p.spans)
    h, dh = (torch.randn(QKV.m, rank, dtype=dtype) for _ in range(2))
    return p, adapters(p), h, dh


def owner(like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A larger gradient, and the sub-block of it that has the shape of ``like``."""
    whole = torch.randn(like.shape[0] + 3, like.shape[1] + 2)
    return whole, whole[: like.shape[0], : like.shape[1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_added_into_an_owners_block(dtype):
    p, group, h, dh = operands(dtype)
    for run, t, z, like in (
        (a_grads, dh, p.x, p.a),
        (b_grads, h, p.dy, p.b),
    ):
        fresh = run(t, z, group, tile=GRAD_TILE)
        owners = [owner(tensor) for tensor in like]
        before = [whole.clone() for whole, _ in owners]
        blocks = [block for _, block in owners]
        assert run(t, z, group, blocks, GRAD_TILE)[0] is blocks[0]
        for (whole, block), was, grad in zip(owners, before, fresh, strict=True):
            rows, columns = block.shape
            torch.testing.assert_close(block, was[:rows, :columns] + grad)
            assert torch.equal(whole[rows:], was[rows:])
            assert torch.equal(whole[:, columns:], was[:, columns:])


def test_gradients_have_the_adapters_dtype():
    p = build(QKV, torch.bfloat16, torch.bfloat16)
    _, _, h, dh = operands(torch.bfloat16)
    grads = a_grads(dh, p.x, adapters(p)) + b_grads(h, p.dy, adapters(p))
    assert {grad.dtype for grad in grads} == {torch.bfloat16}


def test_no_rows_give_zeros():
    p = build(CASES[-1], torch.float32, torch.float32)
    h = torch.empty(0, 4)
    for grad in a_grads(h, p.x, adapters(p)) + b_grads(h, p.dy, adapters(p)):
        assert (grad == 0).all()
