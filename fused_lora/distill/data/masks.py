"""Sets of images with a class for each pixel: the digits' strokes, and folders of masks.

    <path>/classes.txt             one name per line, in the order of the values in a mask
    <path>/train/images/a.jpg      <path>/train/masks/a.png
    <path>/val/images/b.jpg        <path>/val/masks/b.png

A mask has the size of its image and one class per pixel (255: not counted), as grey or palette.
Image and mask are seen under one geometry: what moves the one moves the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.distill.data.sets import DataError, ImageSet, digits, split_folder
from fused_lora.distill.data.views import ScanView, View, expected, photo_view

UNCOUNTED = 255  # in a file
IGNORE = -100  # in a batch, as torch's cross-entropy has it
MODES = ("1", "L", "P", "I", "I;16")  # of PIL: one number per pixel


def digit_masks(split: str) -> ImageSet:
    """scikit-learn's scans; each pixel is background, or stroke of the digit that it shows."""
    plain = digits(split)
    classes = ["background", *plain.classes]
    return replace(
        plain, name=f"digit masks {split}", classes=classes, mask=plain.labels.__getitem__
    )


def folder_of_masks(path: str | Path, split: str) -> ImageSet:
    """A split of the layout above; the masks are read with their images.

    Raises:
        DataError: a folder, ``classes.txt`` or a mask is missing; later, a mask does not decode,
            has another size than its image or holds a value that is no class.
    """
    images = _images(path, split)
    home = images.parent / "masks"
    found = {_stem(file, home): file for file in sorted(home.rglob("*")) if file.is_file()}
    plain = unmasked(path, split)
    names = [_stem(Path(file), images) for file in plain.files]
    if lost := [name for name in names if name not in found]:
        raise DataError(
            f"{home}: no mask for {', '.join(lost[:3])} ({len(lost)} of {len(names)} images)"
        )
    classes = len(plain.classes)

    def mask(i: int) -> Tensor:
        return read_mask(found[names[i]], Path(plain.files[i]), classes)

    return replace(plain, mask=mask)


def unmasked(path: str | Path, split: str) -> ImageSet:
    """Its images alone, for a loss that looks at no mask; all of one label."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader

    root = _images(path, split)
    kinds = tuple(IMG_EXTENSIONS)
    files = sorted(str(f) for f in root.rglob("*") if f.name.lower().endswith(kinds))
    if not files:
        raise DataError(f"{root} holds no image ({', '.join(kinds)})")
    load = files.__getitem__
    about = f"{root} {len(files)}"
    classes = classes_of(Path(path))
    return ImageSet(about, [0] * len(files), classes, lambda i: default_loader(load(i)), files)


def classes_of(path: Path) -> list[str]:
    """The names in ``classes.txt``."""
    file = path / "classes.txt"
    if not file.is_file():
        raise DataError(f"no {str(file)!r}: one name per line, in the order of a mask's values")
    names = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    names = [name for name in names if name]
    if not 2 <= len(names) <= UNCOUNTED:
        raise DataError(f"{file} names {len(names)} classes, not 2 to {UNCOUNTED}")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{file} names {', '.join(twice)} twice")
    return names


def read_mask(file: Path, image: Path, classes: int) -> Tensor:
    """The class of each pixel of ``image`` [height, width], ``IGNORE`` where it does not count."""
    values = _decoded(file)
    if (size := _size(image)) != tuple(values.shape):
        raise DataError(f"{file} is {tuple(values.shape)} (height, width), its image {size}")
    strange = [v for v in values.unique().tolist() if not 0 <= v < classes and v != UNCOUNTED]
    if strange:
        raise DataError(
            f"{file} holds {strange[:5]}, no classes: classes.txt names 0 to {classes - 1}, and "
            f"{UNCOUNTED} does not count"
        )
    return values.masked_fill(values == UNCOUNTED, IGNORE)


def _decoded(file: Path) -> Tensor:
    from PIL import Image
    from torchvision.transforms.v2.functional import pil_to_tensor

    try:
        with Image.open(file) as opened:
            if opened.mode not in MODES:
                raise DataError(f"{file} is {opened.mode}: a mask has one class per pixel {MODES}")
            return pil_to_tensor(opened)[0].to(torch.int64)
    except (OSError, SyntaxError) as error:
        raise DataError(f"{file} does not decode ({type(error).__name__}: {error})") from None


def _size(image: Path) -> tuple[int, int]:
    from PIL import Image

    with Image.open(image) as opened:
        return opened.height, opened.width


def _images(path: str | Path, split: str) -> Path:
    root = split_folder(Path(path), split) / "images"
    if not root.is_dir():
        raise DataError(f"no folder {str(root)!r}: the images of a split lie there")
    return root


def _stem(file: Path, home: Path) -> str:
    return file.relative_to(home).with_suffix("").as_posix()


MASKED: dict[str, Callable[[str, str], ImageSet]] = {
    "digit_masks": lambda path, split: digit_masks(split),
    "masks": folder_of_masks,
}
UNMASKED: dict[str, Callable[[str, str], ImageSet]] = {
    "digit_masks": lambda path, split: replace(digit_masks(split), mask=None),
    "masks": unmasked,
}


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
