"""Images and masks under one geometry: what moves the one moves the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.distill.data.scans import ScanView
from fused_lora.distill.data.views import View, expected, photo_view


class StrokeView(ScanView):
    """A scan, and the class of its digit wherever the seen scan is darker ink than half."""

    def __call__(self, scan: Tensor, digit: int | None = None) -> Any:
        """The image [channels, side, side]; with ``digit`` also the mask [side, side]."""
        image = super().__call__(scan)
        if digit is None:
            return image
        return image, torch.where(image[0] > 0, digit + 1, 0)  # 0 is half, normalised


class MaskedPhotoView:
    """A photograph and its mask, both squeezed to a square of ``side``; nothing is cropped away."""

    def __init__(self, view: View) -> None:
        self.view = view

    def __call__(self, image: Any, mask: Tensor | None = None) -> Any:
        """The image [channels, side, side]; with ``mask`` also that, by nearest neighbours."""
        if mask is None:
            return self.view(image)
        from torchvision.tv_tensors import Mask

        image, mask = self.view(image, Mask(mask))
        return image.as_subclass(Tensor), mask.as_subclass(Tensor)


def masked_view_of(model: nn.Module, source: str, size: int, augment: str) -> View:
    """The view that ``model``, or its encoder, expects."""
    config, channels = expected(model)
    side = size or config["input_size"][-1]
    if source == "digit_masks":
        return StrokeView(side, channels, augment)
    return MaskedPhotoView(photo_view(side, channels, augment, config, whole=True))
