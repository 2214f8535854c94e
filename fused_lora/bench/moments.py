"""AdamW whose moments are lent: contenders take turns, so one set of moments serves them all.

Four contenders of rank 512 on a ViT-B would hold 2.7 GB of moments; nothing that is measured or
judged depends on their values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

Key = tuple[torch.Size, torch.dtype, int, str]  # the last two: which of that shape, which moment


class Moments:
    """A pool of moments by shape; each lives as long as an optimizer that borrows it."""

    def __init__(self) -> None:
        self._pool: WeakValueDictionary[Key, Tensor] = WeakValueDictionary()

    def adamw(self, parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.AdamW:
        """An optimizer of ``parameters`` with borrowed moments."""
        trained = list(parameters)
        optimizer = torch.optim.AdamW(trained, lr=lr, fused=True)
        seen: Counter[tuple[torch.Size, torch.dtype]] = Counter()
        for parameter in trained:
            seen[parameter.shape, parameter.dtype] += 1
            turn = seen[parameter.shape, parameter.dtype]
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": self._lend(parameter, turn, "exp_avg"),
                "exp_avg_sq": self._lend(parameter, turn, "exp_avg_sq"),
            }
        return optimizer

    def _lend(self, parameter: nn.Parameter, turn: int, moment: str) -> Tensor:
        key = (parameter.shape, parameter.dtype, turn, moment)
        held = self._pool.get(key)
        if held is None:
            held = self._pool[key] = torch.zeros_like(parameter, requires_grad=False)
        return held
