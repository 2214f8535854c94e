"""Shrink beyond parity: outputs where the caller wants them."""

import torch

from fused_lora.kernels.triton import lora_shrink
from tests.kernels.triton.cases import CASES, THIN_TILE, adapters, build


def test_nothing_beside_x_is_read_where_packed_rows_are_longer():
    p = build(CASES[1], torch.bfloat16, torch.float32)  # 71 and 93 columns
    for source, run in ((p.x, lora_shrink.shrink), (p.dy, lora_shrink.shrink_grad)):
        m, width = source.shape
        wide = torch.full((m, width + 16), torch.nan, dtype=source.dtype)
        wide[:, :width] = source
        expected = run(source, adapters(p), tile=THIN_TILE)
        assert expected.isfinite().all()
        assert torch.equal(run(wide[:, :width], adapters(p), tile=THIN_TILE), expected)


def test_the_right_end_of_a_bordered_buffer():
    p = build(CASES[3], torch.bfloat16, torch.float32)
    m, k = p.x.shape
    for source, run in ((p.x, lora_shrink.shrink), (p.dy, lora_shrink.shrink_grad)):
        expected = run(source, adapters(p), tile=THIN_TILE)
        buffer = torch.full((m, k + expected.shape[1] + 3), 7.0, dtype=source.dtype)
        tail = buffer[:, k:-3]
        assert run(source, adapters(p), tail, THIN_TILE) is tail
        assert torch.equal(tail, expected)
        assert (buffer[:, :k] == 7).all() and (buffer[:, -3:] == 7).all()
