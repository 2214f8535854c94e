"""Segmentation of images larger than the model's: windows that overlap, and the score they get."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def sliding_window(
    predict: Callable[[Tensor], Tensor], images: Tensor, window: int, stride: int
) -> Tensor:
    """Logits of whole images: the mean of those of the windows that see a pixel.

    Args:
        predict: images [B, channels, window, window] to logits [B, classes, window, window].
        images: [B, channels, height, width], from ``window`` pixels on either side.
        window: side of a window in pixels.
        stride: from one window to the next; the last ones end at the border.

    Returns:
        Logits [B, classes, height, width].

    Raises:
        ValueError: a stride that leaves gaps, an image smaller than the window, or predictions of
            another size.
    """
    height, width = images.shape[-2:]
    if not 1 <= stride <= window:
        raise ValueError(f"stride must lie in 1 to window = {window}, got {stride}")
    if min(height, width) < window:
        raise ValueError(f"images of {height} x {width} are smaller than a window of {window}")
    total, seen = None, images.new_zeros(height, width)
    for top in _starts(height, window, stride):
        for left in _starts(width, window, stride):
            rows, columns = slice(top, top + window), slice(left, left + window)
            logits = predict(images[..., rows, columns])
            if logits.shape[-2:] != (window, window):
                raise ValueError(f"predictions are {tuple(logits.shape)}, the window {window}")
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], height, width)
            total[..., rows, columns] += logits
            seen[rows, columns] += 1
    assert total is not None
    return total / seen.to(total.dtype)


def _starts(length: int, window: int, stride: int) -> Iterator[int]:
    yield from range(0, length - window, stride)
    yield length - window


class MeanIoU:
    """Intersection over union of each class, over any number of batches.

    Args:
        classes: how many.
        ignore: label of pixels that do not count.
    """

    def __init__(self, classes: int, ignore: int = 255):
        self.classes, self.ignore = classes, ignore
        self.confusion = torch.zeros(classes, classes, dtype=torch.int64)  # [label, prediction]

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count logits [B, classes, height, width] against labels [B, height, width]."""
        if logits.shape[1] != self.classes or logits.shape[:1] + logits.shape[2:] != labels.shape:
            raise ValueError(
                f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} do not fit "
                f"{self.classes} classes"
            )
        counted = labels != self.ignore
        true, guess = labels[counted], logits.argmax(1)[counted]
        if true.numel() and not 0 <= int(true.min()) <= int(true.max()) < self.classes:
            raise ValueError(
                f"labels run from {int(true.min())} to {int(true.max())}, classes to "
                f"{self.classes - 1}"
            )
        pairs = torch.bincount(true * self.classes + guess, minlength=self.classes**2)
        self.confusion += pairs.view(self.classes, self.classes).cpu()

    def per_class(self) -> Tensor:
        """[classes], NaN for a class that neither labels nor predictions have."""
        hits = self.confusion.diagonal().double()
        return hits / (self.confusion.sum(0) + self.confusion.sum(1) - hits)

    def dice(self) -> Tensor:
        """[classes], 2 |A and B| / (|A| + |B|), NaN as above."""
        hits = self.confusion.diagonal().double()
        return 2 * hits / (self.confusion.sum(0) + self.confusion.sum(1))

    def mean(self) -> float:
        """Over the classes that occur."""
        return float(self.per_class().nanmean())
