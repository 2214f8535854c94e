"""Views of small grey scans, in torch alone: no image library stands between disk and model."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

MEAN, STD = 0.5, 0.5
TURN, SHIFT, ZOOM = 10.0, 1 / 8, 0.1  # degrees; share of the side; share of the size, at most


class ScanView:
    """A uint8 tensor [1, h, w] as a model's [channels, side, side]."""

    def __init__(self, side: int, channels: int, augment: str) -> None:
        if augment not in ("none", "shift"):
            raise ValueError(f"data.augment = {augment!r} is for photographs; scans take 'shift'")
        self.side, self.channels, self.augment = side, channels, augment

    def __call__(self, scan: Tensor) -> Tensor:
        """Resized, perhaps moved a little, normalised."""
        image = scan.float()[None] / 255  # [1, 1, h, w]
        if scan.shape[-1] != self.side:
            size = (self.side, self.side)
            image = F.interpolate(image, size, mode="bilinear", align_corners=False)
        if self.augment == "shift":
            image = F.grid_sample(image, _moved(image), align_corners=False)
        return ((image[0] - MEAN) / STD).expand(self.channels, -1, -1)


def _moved(image: Tensor) -> Tensor:
    """The sampling grid of a random rotation, shift and zoom."""
    turn, right, down, zoom = (2 * torch.rand(4) - 1).tolist()
    angle, size = math.radians(TURN * turn), 1 + ZOOM * zoom
    cos, sin = math.cos(angle) * size, math.sin(angle) * size
    matrix = [[cos, -sin, 2 * SHIFT * right], [sin, cos, 2 * SHIFT * down]]
    return F.affine_grid(torch.tensor([matrix]), list(image.shape), align_corners=False)
