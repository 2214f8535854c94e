"""Sets of labelled images, each read one at a time, and a few images chosen out of many."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from fused_lora.arguments import all_finite

TRAIN, TEST = "train", "test"
TEST_SHARE = 5  # every fifth digit of a class is for testing
ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


class DataError(ValueError):
    """Data that cannot be used, with the folder, class or file."""


@dataclass(frozen=True)
class ImageSet:
    """Labelled images, not yet decoded."""

    name: str  # tells it from other sets, for caches
    labels: list[int]
    classes: list[str]
    load: Callable[[int], Any]  # image i: PIL, or a uint8 tensor [C, H, W]
    files: Sequence[str] = ()  # image i's file, where it has one
    mask: Callable[[int], Any] | None = None  # what the view makes image i's mask of, if it has one

    def __len__(self) -> int:
        return len(self.labels)


@lru_cache(maxsize=2)
def digits(split: str) -> ImageSet:
    """1797 scans of handwritten digits, 8 x 8, which come with scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("the digits need scikit-learn: pip install fused_lora[distill]") from None
    bunch = load_digits()
    images = torch.from_numpy(bunch.images * (255 / 16)).round().to(torch.uint8)  # [n, 8, 8]
    labels, seen, chosen = bunch.target.tolist(), [0] * 10, []
    for i, label in enumerate(labels):
        if (seen[label] % TEST_SHARE == TEST_SHARE - 1) == (split == TEST):
            chosen.append(i)
        seen[label] += 1
    names = [str(digit) for digit in range(10)]
    mine = images[chosen].unsqueeze(1)  # [n, 1, 8, 8]
    return ImageSet(f"digits {split}", [labels[i] for i in chosen], names, mine.__getitem__)


def only(every: ImageSet, names: Sequence[str]) -> ImageSet:
    """Those of ``every`` that show one of the classes ``names``, labelled in that order.

    To learn on some classes, and adapt to others. Raises DataError for a class that is none of the
    set's, or named twice.
    """
    if unknown := [name for name in names if name not in every.classes]:
        raise DataError(
            f"data.classes: {every.name} has no class {unknown}; its classes are {every.classes}"
        )
    if len(set(names)) < len(names):
        raise DataError(f"data.classes names a class twice: {list(names)}")
    label_of = {every.classes.index(name): i for i, name in enumerate(names)}
    rows = [i for i, label in enumerate(every.labels) if label in label_of]
    files = [every.files[i] for i in rows] if every.files else ()
    return ImageSet(
        f"{every.name} {'|'.join(names)}",
        [label_of[every.labels[i]] for i in rows],
        list(names),
        lambda i: every.load(rows[i]),
        files,
    )


def folder(path: str | Path, split: str) -> ImageSet:
    """``path/train`` and ``path/val`` (or ``test``), with a folder of images per class in each.

    The same in a tar archive, compressed or not, is read as it is; its files stay in memory.
    """
    if Path(path).is_file():
        return archive(str(path), split, os.stat(path).st_mtime_ns)
    root = split_folder(Path(path), split)
    from torchvision.datasets import ImageFolder

    empty = [c.name for c in sorted(root.iterdir()) if c.is_dir() and not any(c.rglob("*.*"))]
    if empty:
        raise DataError(f"{root}: no images of the class {', '.join(empty)}")
    try:
        found = ImageFolder(str(root))
    except FileNotFoundError as error:
        raise DataError(f"{root}: {error}") from None
    files = [file for file, _ in found.samples]
    return ImageSet(
        f"{root} {len(files)}",
        [label for _, label in found.samples],
        found.classes,
        lambda i: found.loader(files[i]),
        files,
    )


@lru_cache(maxsize=2)
def archive(path: str, split: str, _changed_ns: int = 0) -> ImageSet:
    """``folder`` within the tar file ``path``; raises DataError where it is none."""
    files: dict[str, dict[str, bytes]] = {name: {} for name in _names(split)}
    inside: set[str] = set()
    try:
        with tarfile.open(path) as packed:
            for member in packed:
                parts = PurePosixPath(member.name).parts
                inside.update(parts[:-2])
                image = member.isfile() and member.name.lower().endswith(ENDINGS)
                if image and len(parts) > 2 and parts[-3] in files:
                    opened = packed.extractfile(member)
                    assert opened is not None  # of a file
                    files[parts[-3]][member.name] = opened.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"data.path: {path} is no tar archive that can be read: {error}") from None
    found = next((each for each in files.values() if each), None)
    if found is None:
        raise DataError(
            f"{path}: no images in {' or '.join(files)}/<class>/; it has {sorted(inside)[:8]}"
        )
    names = sorted(found)
    classes = sorted({PurePosixPath(name).parts[-2] for name in names})
    labels = [classes.index(PurePosixPath(name).parts[-2]) for name in names]

    def load(i: int) -> Any:
        from PIL import Image

        return Image.open(io.BytesIO(found[names[i]])).convert("RGB")

    names_of = [f"{path}: {name}" for name in names]
    return ImageSet(f"{path} {split} {len(names)}", labels, classes, load, names_of)


def huggingface(path: str | Path, split: str) -> ImageSet:
    """A folder that ``datasets.save_to_disk`` wrote, or that ``datasets.load_dataset`` reads."""
    if not Path(path).is_dir():
        raise DataError(f"data.path: no folder {str(path)!r}")
    try:
        import datasets
    except ImportError:
        raise DataError("the source huggingface needs the datasets package") from None
    saved = any((Path(path) / name).is_file() for name in ("dataset_dict.json", "state.json"))
    whole = datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(str(path))
    names = [name for name in _names(split) if name in whole]
    if not names:
        raise DataError(f"{path}: no split {_names(split)}; it has {list(whole)}")
    rows = whole[names[0]]
    image = _column(rows, "Image", path)
    label = _column(rows, "ClassLabel", path)
    labels = [int(value) for value in rows[label]]
    classes = list(rows.features[label].names)
    return ImageSet(f"{path} {names[0]} {len(labels)}", labels, classes, lambda i: rows[i][image])


def _column(rows: Any, kind: str, path: str | Path) -> str:
    for name, feature in rows.features.items():
        if type(feature).__name__ == kind:
            return name
    raise DataError(f"{path}: no column of type {kind}; its columns are {dict(rows.features)}")


def _names(split: str) -> list[str]:
    return ["train"] if split == TRAIN else ["validation", "val", "test"]


def split_folder(path: Path, split: str) -> Path:
    """The folder of a split; raises DataError, with what is there, where there is none."""
    if not path.is_dir():
        raise DataError(f"data.path: no folder {str(path)!r}")
    for name in _names(split):
        if (path / name).is_dir():
            return path / name
    inside = sorted(child.name for child in path.iterdir() if child.is_dir())
    raise DataError(f"{path}: no folder {' or '.join(_names(split))} in it; there are {inside}")


def located(path: str) -> str:
    """``path``, its first part taken from the environment where it is "$NAME"."""
    found = os.path.expandvars(path)
    if found.startswith("$"):
        raise DataError(f"data.path = {path!r}: the environment has no variable of that name")
    return found


SOURCES: dict[str, Callable[[str, str], ImageSet]] = {
    "digits": lambda path, split: digits(split),
    "digits_low": lambda path, split: only(digits(split), "01234"),
    "digits_high": lambda path, split: only(digits(split), "56789"),
    "folder": folder,
    "huggingface": huggingface,
}


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

    if not all_finite(features):
        raise DataError("kmeans++: the teacher's features hold non-finite values")
    count = max(1, round(fraction * len(features)))
    _, chosen = kmeans_plusplus(features.double().numpy(), count, random_state=seed)
    return sorted(set(chosen.tolist()))
