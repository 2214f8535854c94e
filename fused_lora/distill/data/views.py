"""From an image to what a model takes: resized, augmented, normalised, the same for a seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fused_lora.distill.data.scans import ScanView
from fused_lora.distill.data.sets import DataError, ImageSet
from fused_lora.distill.seeds import seeded

View = Callable[..., Any]  # of an image; of an image and its mask, where the set has masks
Seen = tuple[Tensor, int | Tensor]  # image [C, H, W], and its label or its mask [H, W]


def view_of(model: nn.Module, source: str, size: int, augment: str) -> View:
    """The view that ``model`` expects, in timm's figures where it has any."""
    config, channels = expected(model)
    side = size or config["input_size"][-1]
    if source.startswith("digits"):
        return ScanView(side, channels, augment)
    return photo_view(side, channels, augment, config)


def photo_view(
    side: int, channels: int, augment: str, config: dict[str, Any], *, whole: bool = False
) -> View:
    """Of PIL images and uint8 tensors, by torchvision; ``whole`` crops no border away."""
    from torchvision.transforms import v2

    mean, std = (list(config[key])[:channels] for key in ("mean", "std"))
    mode = v2.InterpolationMode(config["interpolation"])
    return v2.Compose(
        [
            v2.ToImage(),
            v2.RGB() if channels == 3 else v2.Grayscale(channels),
            *_geometry(augment, side, None if whole else config["crop_pct"], mode),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean, std),
        ]
    )


def expected(model: nn.Module) -> tuple[dict[str, Any], int]:
    """What the model's weights were trained on, as timm says it, and its channels."""
    from timm.data import resolve_data_config

    config = resolve_data_config(model=model, use_test_size=True)
    embed = getattr(model, "patch_embed", None)
    convolutions = (m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    channels = next(convolutions, config["input_size"][0])
    if own := getattr(embed, "img_size", None):
        config["input_size"] = (channels, *own)
    return config, channels


def _geometry(augment: str, side: int, crop: float | None, mode: Any) -> list[Any]:
    from torchvision.transforms import v2

    if augment == "crop":
        return [v2.RandomResizedCrop(side, interpolation=mode), v2.RandomHorizontalFlip()]
    if crop is None:
        straight = [v2.Resize((side, side), interpolation=mode)]
    else:
        straight = [v2.Resize(int(side / crop), interpolation=mode), v2.CenterCrop(side)]
    if augment == "shift":
        straight.append(v2.RandomCrop(side, max(1, side // 8), padding_mode="reflect"))
    return straight if augment == "none" else [*straight, v2.RandomHorizontalFlip()]


class Viewed(Dataset):
    """Chosen images of a set, as tensors; image i of epoch e looks the same in every run."""

    def __init__(
        self,
        images: ImageSet,
        view: View,
        seed: int = 0,
        bad_images: str = "raise",
        keep: bool = False,
    ) -> None:
        self.images, self.view, self.seed, self.bad_images = images, view, seed, bad_images
        self.kept: dict[int, Seen] | None = {} if keep else None  # views that never change

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int | Tensor, int] | None:
        """(image [C, H, W], label or mask, i) of (i, epoch); None for one that does not decode."""
        i, epoch = key
        if self.kept is not None and i in self.kept:
            return *self.kept[i], i
        try:
            image = self.images.load(i)
        except (OSError, ValueError, SyntaxError) as error:
            if self.bad_images == "skip":
                return None
            where = (
                self.images.files[i] if self.images.files else f"image {i} of {self.images.name}"
            )
            raise DataError(
                f"{where} does not decode ({type(error).__name__}: {error}); data.bad_images = "
                "'skip' passes over such images and counts them"
            ) from None
        with seeded((self.seed * 1_000_003 + epoch) * 1_000_000_007 + i):
            seen = self._seen(image, i)
        if self.kept is not None:
            self.kept[i] = seen
        return *seen, i

    def _seen(self, image: Any, i: int) -> Seen:
        if self.images.mask is None:
            return self.view(image), self.images.labels[i]
        return self.view(image, self.images.mask(i))
