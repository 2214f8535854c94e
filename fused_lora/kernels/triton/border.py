"""The adapters of one call as kernels read them: one border [sum R, C] made of G blocks.

                columns of group 0   group 1
    ranks of 0  [     block 0      |    0    ]     of a: every block spans all K columns of x
    ranks of 1  [        0         | block 1 ]     of b, transposed: block g lies in g's span of y

Nothing is stacked in memory: a block stays where it is, in its own dtype and strides. Every kernel
of this room is a product with this matrix: shrink x aT and dy (s b), expand h (s b)T and dh a,
merge (s b) a, and the gradients are border-shaped outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from torch import Tensor

from fused_lora.kernels.interface import Adapters
from fused_lora.kernels.triton.tiles import power_of_two


class Border(NamedTuple):
    """One entry per group in every field; Triton takes it apart as a kernel argument."""

    blocks: tuple[Tensor, ...]  # G of [R_g, C_g], one dtype
    rank_strides: tuple[int, ...]
    column_strides: tuple[int, ...]
    firsts: tuple[int, ...]  # G + 1: stacked rank where each begins; the last is sum R
    starts: tuple[int, ...]  # first column of each
    stops: tuple[int, ...]  # one past the last
    scales: tuple[float, ...]  # s_g, or 1 where the product carries none

    @property
    def rank(self) -> int:
        """sum R."""
        return self.firsts[-1]

    @property
    def word(self) -> str:
        """What is said behind the name of a product with it, where several have odd ranks."""
        odd = len(self.blocks) > 1 and any(first % 16 for first in self.firsts)
        return " ragged" if odd else ""

    def rank_block(self, most: int) -> int:
        """Ranks per step of a loop; of ragged ranks 16, each of which is loaded by itself."""
        ragged = any(first % 16 for first in self.firsts)
        return 16 if ragged else power_of_two(self.rank, 16, most)


def of_a(adapters: Adapters, blocks: Sequence[Tensor] | None = None) -> Border:
    """The a, or tensors shaped like them, over all K columns of x, unscaled."""
    blocks = adapters.a if blocks is None else blocks
    columns = [(0, block.shape[1]) for block in blocks]
    return _border(blocks, columns, [1.0] * len(blocks))


def of_b(adapters: Adapters, blocks: Sequence[Tensor] | None = None) -> Border:
    """The b, or tensors shaped like them, transposed, each over its span of y."""
    blocks = adapters.b if blocks is None else blocks
    columns = [(span.start, span.stop) for span in adapters.spans]
    return _border([block.t() for block in blocks], columns, adapters.scales)


def _border(
    blocks: Sequence[Tensor], columns: Sequence[tuple[int, int]], scales: Sequence[float]
) -> Border:
    for block, (start, stop) in zip(blocks, columns, strict=True):
        assert block.shape[1] == stop - start, (tuple(block.shape), start, stop)
        assert block.dtype is blocks[0].dtype, (block.dtype, blocks[0].dtype)
    starts, stops = zip(*columns, strict=True)
    return Border(
        tuple(blocks),
        tuple(block.stride(0) for block in blocks),
        tuple(block.stride(1) for block in blocks),
        tuple(accumulate((block.shape[0] for block in blocks), initial=0)),
        starts,
        stops,
        tuple(float(scale) for scale in scales),
    )
