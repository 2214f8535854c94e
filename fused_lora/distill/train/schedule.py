"""The learning rate as a function of the step alone, so that there is nothing to save of it."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Cosine:
    """lr = blr x effective batch / 256, up a line in the warm-up, down half a cosine to 0."""

    blr: float
    effective_batch: int
    steps: int
    warmup: float  # share of the steps

    @property
    def peak(self) -> float:
        """The learning rate where the warm-up ends."""
        return self.blr * self.effective_batch / 256

    def at(self, step: int) -> float:
        """The learning rate of ``step``, counted from 0."""
        rising = round(self.warmup * self.steps)
        if step < rising:
            return self.peak * (step + 1) / rising
        done = (step - rising) / max(1, self.steps - rising)
        return self.peak * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
