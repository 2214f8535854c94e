"""Many merges in one launch have the bits of one at a time, and the reference's random bits."""

import pytest
import torch

from fused_lora.kernels.triton import lora_merge as merging
from fused_lora.kernels.triton.lora_merge import Merge, lora_merge
from fused_lora.kernels.triton.tiles import MergeTile
from fused_lora.reference import lora_merge as reference
from fused_lora.types import Span
from tests.kernels.triton.cases import DTYPES

TILE = MergeTile(32, 32)
NOISE = (2**63 + 5, 2**40 + 1)
ALIGNED = [(64, 48, 16), (33, 96, 5), (32, 32, 0), (1, 16, 1), (0, 16, 2)]
ODD = [(37, 43, 5), (64, 33, 20), (3, 1, 1), (70, 64, 16)]


def build(sizes, dtype):
    """Merges whose b a is exact in fp32: eighths; the outputs start as NaN."""
    merges = []
    for i, (n, k, r) in enumerate(sizes):
        a, b = (torch.randint(-8, 9, shape) / 8 for shape in ((r, k), (n, r)))
        w = torch.randn(n, k).to(dtype)
        merges.append(Merge(w, torch.full_like(w, torch.nan), a, b, 2.0**-i, 8 * i))
    return merges


@pytest.mark.parametrize("sizes", [ALIGNED, ODD], ids=["aligned", "odd"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_to_nearest(sizes, dtype):
    merges = build(sizes, dtype)
    table = merging.pack(merges, TILE)
    assert all(merge.aligned for merge in table.merges) == (sizes is ALIGNED)
    merging.launch_many(table)
    for m in merges:
        assert torch.equal(m.out, reference.merge(m.w, m.a, m.b, m.scale))


@pytest.mark.parametrize("sizes", [ALIGNED, ODD], ids=["aligned", "odd"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_stochastic_rounding_has_the_references_bits(sizes, dtype):
    merges = build(sizes, dtype)
    merging.launch_many(merging.pack(merges, TILE), NOISE)
    for m in merges:
        truth = reference.merge(m.w, m.a, m.b, m.scale, "stochastic", *NOISE, offset=m.offset)
        assert torch.equal(m.out, truth)


def test_blocks_of_the_rows_of_one_matrix_in_place():
    """A fused qkv: the random bits of a block follow from where it begins."""
    w = torch.randn(96, 48).bfloat16()
    spans = tuple(Span(32 * g, 32 * g + 32, 4) for g in range(3))
    a, b = ([torch.randn(*shape) for _ in spans] for shape in ((4, 48), (32, 4)))
    whole = lora_merge(w, a, b, (1.0, 0.3, 2.0), spans, NOISE, tile=TILE)
    blocks = [w[span.start : span.stop] for span in spans]
    rows = zip(blocks, blocks, a, b, (1.0, 0.3, 2.0), (0, 32 * 48, 64 * 48), strict=True)
    merging.launch_many(merging.pack([Merge(*row) for row in rows], TILE), NOISE)
    assert torch.equal(w, whole)


def test_strided_operands_and_rows():
    wide = torch.randn(40, 100)
    w, out = wide[:, :30], torch.full((40, 50), torch.nan)
    a, b = torch.randn(30, 9)[:, :6].t(), torch.randn(8, 40)[:6].t()
    merging.launch_many(merging.pack([Merge(w, out[:, 10:40], a, b, 0.5)], TILE))
    torch.testing.assert_close(out[:, 10:40], w + 0.5 * b @ a)
    assert out[:, :10].isnan().all() and out[:, 40:].isnan().all()


def test_nothing_to_do():
    merging.launch_many(merging.pack([]))
    merging.launch_many(merging.pack(build(ALIGNED[-1:], torch.float32)))
