"""Linear CKA: how alike two sets of features are, up to rotation and scale.

    CKA(X, Y) = HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y))    X [n, p], Y [n, q], same n images

All images at once (Kornblith et al. 2019, equation 3, centred):
    HSIC_0(X, Y) = |XcT Yc|_F^2
Batch by batch (Nguyen et al. 2021), the mean over batches of Song et al. 2012's unbiased estimator,
with K = X XT and L = Y YT, diagonals set to zero:
    HSIC_1(X, Y) = (tr(K L) + 1T K 1 1T L 1 / ((n - 1)(n - 2)) - 2 1T K L 1 / (n - 2)) / (n (n - 3))
All sums are float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from fused_lora.distill.blocks import Tokens, blocks_of, tokens_of
from fused_lora.distill.data.batches import Batch
from fused_lora.distill.share import MAPPINGS

LEAST = 4  # images of a batch


def linear_cka(x: Tensor, y: Tensor) -> float:
    """CKA of x [n, p] and y [n, q] over all n rows, from 0 to 1; NaN where one is constant.

    Raises:
        ValueError: row counts that differ, or not two dimensions.
    """
    _check_pair(x, y, 2)
    x, y = ((t.double() - t.double().mean(0)) for t in (x, y))
    cross = (x.T @ y).square().sum()
    return float(cross / ((x.T @ x).norm() * (y.T @ y).norm()))


class MinibatchCKA:
    """CKA between every layer of one model and every layer of another, batch by batch."""

    def __init__(self) -> None:
        self._cross: Tensor | None = None  # [layers x, layers y], sums over batches
        self._own: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))

    def update(self, xs: Sequence[Tensor], ys: Sequence[Tensor]) -> None:
        """Add one batch: xs and ys hold one [n, features] per layer, of the same n >= 4 images.

        Raises:
            ValueError: row counts that differ, fewer than 4 rows, or another number of layers
                than before.
        """
        for x in xs:
            for y in ys:
                _check_pair(x, y, LEAST)
        with torch.no_grad():
            ks, ls = ([_gram(t) for t in side] for side in (xs, ys))
            cross = torch.stack([torch.stack([_hsic(k, m) for m in ls]) for k in ks])
            own = tuple(torch.stack([_hsic(k, k) for k in side]) for side in (ks, ls))
        if self._cross is None:
            self._cross, self._own = cross, own  # type: ignore[assignment]
        elif self._cross.shape != cross.shape:
            raise ValueError(f"layers were {tuple(self._cross.shape)}, now {tuple(cross.shape)}")
        else:
            self._cross = self._cross + cross
            self._own = self._own[0] + own[0], self._own[1] + own[1]

    def result(self) -> Tensor:
        """[layers x, layers y] float64 on the CPU; raises ValueError before the first batch."""
        if self._cross is None:
            raise ValueError("no batch was counted: call update first")
        x, y = self._own
        return (self._cross / torch.outer(x, y).sqrt()).cpu()


def layer_cka(
    teacher: nn.Module, student: nn.Module, batches: Iterable[Tensor], *, patches: bool = False
) -> Tensor:
    """CKA [L_t, L_s] between the blocks of two models on the same images.

    Args:
        teacher: a vision transformer.
        student: another.
        batches: images [B, channels, height, width], B >= 4.
        patches: compare the mean patch token of an image rather than its class token.

    Raises:
        ValueError: no batch, or one of fewer than 4 images.
    """
    sums = MinibatchCKA()
    with torch.no_grad():
        for images in batches:
            found = [tokens_of(model, images, norm=False) for model in (teacher, student)]
            sums.update(*(_pooled(tokens, patches) for tokens in found))
    return sums.result()


def _pooled(tokens: Tokens, patches: bool) -> list[Tensor]:
    return [block.mean(1) for block in tokens.patches] if patches else tokens.classes


def _gram(x: Tensor) -> Tensor:
    x = x.double()
    return (x @ x.T).fill_diagonal_(0)


def _hsic(k: Tensor, m: Tensor) -> Tensor:
    n = len(k)
    trace, sums = (k * m).sum(), (k.sum(), m.sum())
    mixed = k.sum(0) @ m.sum(0)
    inner = trace + sums[0] * sums[1] / ((n - 1) * (n - 2)) - 2 * mixed / (n - 2)
    return inner / (n * (n - 3))


def _check_pair(x: Tensor, y: Tensor, least: int) -> None:
    if x.dim() != 2 or y.dim() != 2 or len(x) != len(y) or len(x) < least:
        raise ValueError(
            f"CKA compares [n, p] with [n, q], n >= {least}; got {tuple(x.shape)} and "
            f"{tuple(y.shape)}"
        )


def comparable(batches: Iterable[Batch]) -> Iterator[Tensor]:
    """The images of those batches that have enough for CKA."""
    return (batch.images for batch in batches if len(batch.labels) >= LEAST)


def mapped_cka(
    teacher: nn.Module, student: nn.Module, mapping: str, batches: Iterator[Batch]
) -> dict[str, dict[str, float]]:
    """CKA of each of the student's blocks with the one of the teacher that it is mapped to."""
    theirs, mine = ([block.name for block in blocks_of(model)] for model in (teacher, student))
    table = layer_cka(teacher, student, comparable(batches))  # [L_t, L_s]
    chosen = [MAPPINGS[mapping](i, len(mine), len(theirs)) for i in range(len(mine))]
    return {mine[i]: {theirs[g]: float(table[g, i])} for i, g in enumerate(chosen)}
