"""Few images out of many: as many of each class, any, or spread out by k-means++; by a seed."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_lora.distill.data.sets import DataError


def balanced(labels: list[int], fraction: float, seed: int) -> list[int]:
    """``fraction`` of each class, at least one, in ascending order.

    A larger fraction of one seed holds every image of a smaller one.
    """
    generator = torch.Generator().manual_seed(seed)
    of_class = torch.tensor(labels)
    chosen: list[int] = []
    for label in sorted(set(labels)):
        mine = (of_class == label).nonzero().flatten()
        order = mine[torch.randperm(len(mine), generator=generator)]
        chosen += order[: max(1, round(fraction * len(mine)))].tolist()
    return sorted(chosen)


def uniform(count: int, fraction: float, seed: int) -> list[int]:
    """``fraction`` of ``count`` images, no label looked at."""
    generator = torch.Generator().manual_seed(seed)
    few = max(1, round(fraction * count))
    return sorted(torch.randperm(count, generator=generator)[:few].tolist())


def spread(features: Tensor, fraction: float, seed: int) -> list[int]:
    """k-means++ seeds of ``features`` [n, d]: each far from those before; no label is looked at."""
    from sklearn.cluster import kmeans_plusplus

    if not bool(torch.isfinite(features).all()):
        raise DataError("kmeans++: the teacher's features hold non-finite values")
    count = max(1, round(fraction * len(features)))
    _, chosen = kmeans_plusplus(features.double().numpy(), count, random_state=seed)
    return sorted(set(chosen.tolist()))
