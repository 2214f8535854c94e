"""Several weights, each with all of its adapters, merged in one launch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from fused_lora.kernels.interface import Adapters
from fused_lora.kernels.triton.lora_merge import TILE
from fused_lora.kernels.triton.lora_merge_many import Merge, launch_many, pack
from fused_lora.kernels.triton.tiles import MergeTile


def merged_together(
    weights: Sequence[Tensor],  # [N, K] each, rows contiguous, one dtype
    adapters: Sequence[Adapters],  # of each; every a in one dtype, and every b
    noise: tuple[int, int] | None = None,  # (seed, step) of stochastic rounding
    tile: MergeTile = TILE,
) -> list[Tensor]:
    """Every w', a new tensor, rounded to nearest or stochastically."""
    made = [w.new_empty(tuple(w.shape)) for w in weights]
    rows = zip(weights, made, adapters, strict=True)
    launch_many(pack([merge for row in rows for merge in _blocks(*row)], tile), noise)
    return made


def _blocks(w: Tensor, out: Tensor, adapters: Adapters) -> Iterator[Merge]:
    """A merge for the rows of every adapter, and a copy for those of none."""
    n, k = w.shape
    a, b = adapters.a[0][:0], adapters.b[0]
    done = 0
    for a_g, b_g, scale, span in sorted(zip(*adapters, strict=True), key=lambda row: row[3].start):
        assert span.start >= done, (span, done)
        free, rows = slice(done, span.start), slice(span.start, span.stop)
        yield Merge(w[free], out[free], a, b.new_empty((span.start - done, 0)))
        yield Merge(w[rows], out[rows], a_g, b_g, scale, span.start * k)
        done = span.stop
    yield Merge(w[done:], out[done:], a, b.new_empty((n - done, 0)))
