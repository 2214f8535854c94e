"""From an image to what a model takes: resized, augmented, normalised, the same for a seed.

Random numbers are a function of where a run is, so that there is no state to save. They do not come
by ``torch.manual_seed``, which queues a call with its traceback for a GPU that may never be used: a
millisecond each time, and never freed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from fused_lora.distill.data.sets import DataError, ImageSet


def seed(number: int) -> None:
    """Seed the CPU's generator, and the GPU's where there is one in use."""
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(number)


@contextmanager
def seeded(number: int) -> Iterator[None]:
    """Within the block the CPU draws the numbers of ``number``; afterwards it goes on as before."""
    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(number)
    try:
        yield
    finally:
        torch.default_generator.set_state(before)


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


class TransformedImages(Dataset):
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
