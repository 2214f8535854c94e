"""Folders of masks, the strokes of the digits, and the score of segments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fused_lora.distill.data.masks import (
    IGNORE,
    MaskedPhotoView,
    StrokeView,
    classes_of,
    digit_masks,
    folder_of_masks,
    masked_view_of,
    read_mask,
    unmasked,
)
from fused_lora.distill.data.sets import DataError
from fused_lora.distill.data.views import TransformedImages
from fused_lora.distill.recipe import Recipe
from fused_lora.distill.run import distill
from fused_lora.distill.segmentation import MeanIoU
from tests.distill.runs import UNET, segmenting, unet, unet_checkpoint

SIZE = (18, 12)  # width, height


def masked(home: Path, splits: tuple[str, ...] = ("train", "val"), count: int = 5) -> Path:
    """Grey photographs whose left part, brighter, is of the second class."""
    home.mkdir(parents=True, exist_ok=True)
    (home / "classes.txt").write_text("ground\nfield\n")
    for split in splits:
        for i in range(count):
            mask = Image.new("L", SIZE, 0)
            mask.paste(1, (0, 0, 3 + 2 * i, SIZE[1]))
            image = mask.point(lambda value: 40 + 160 * value).convert("RGB")
            for kind, picture, end in (("images", image, "png"), ("masks", mask, "png")):
                file = home / split / kind / "a" / f"{i}.{end}"
                file.parent.mkdir(parents=True, exist_ok=True)
                picture.save(file)
    return home


def asked(folder: Path, home: Path, **tables: Any) -> Recipe:
    """A student of a U-Net with two classes, on the images of ``home``."""
    model = {"num_classes": 2, "in_chans": 3}
    teacher = {"options": UNET | model, "checkpoint": unet_checkpoint(folder, **model)}
    data = {"source": "masks", "path": str(home), "fraction": 1.0} | tables.pop("data", {})
    train = {"steps": 3, "batch_size": 2}
    return segmenting(folder, teacher=teacher, data=data, train=train, **tables)


def test_a_student_of_a_folder_needs_masks_for_its_figures_alone(tmp_path: Path) -> None:
    home = masked(tmp_path / "set")
    for file in (home / "train" / "masks" / "a").iterdir():
        file.unlink()
    (home / "train" / "images" / "a" / "0.png").write_bytes(b"no image")
    skipping = asked(tmp_path, home, data={"bad_images": "skip", "augment": "flip"})
    figures = distill(skipping, tmp_path / "run")["figures"]
    assert set(figures["iou"]) == {"ground", "field"} and figures["skipped"] >= 1
    with pytest.raises(DataError, match=r"train/masks: no mask for a/0, a/1, a/2 \(5 of 5 images"):
        distill(asked(tmp_path, home, loss={"labels": 1.0}), tmp_path / "more")
    learns = asked(tmp_path, masked(tmp_path / "whole"), method="finetune")
    assert distill(learns, tmp_path / "taught")["figures"]["steps"] == 3


def spoil(home: Path, what: str) -> None:
    mask = home / "val" / "masks" / "a" / "3.png"
    if what == "missing":
        mask.unlink()
    elif what == "size":
        Image.new("L", (5, 7)).save(mask)
    elif what == "value":
        Image.new("L", SIZE, 9).save(mask)
    elif what == "colour":
        Image.new("RGB", SIZE).save(mask)
    elif what == "bytes":
        mask.write_bytes(b"no image")
    elif what == "images":
        (home / "val" / "images").rename(home / "val" / "pictures")
    elif what == "empty":
        for file in (home / "val" / "images" / "a").iterdir():
            file.unlink()
    else:
        (home / "classes.txt").write_text(what)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", r"val/masks: no mask for a/3 \(1 of 5 images\)"),
        ("size", r"a/3.png is \(7, 5\) \(height, width\), its image \(12, 18\)"),
        ("value", r"a/3.png holds \[9\], no classes: classes.txt names 0 to 1, and 255"),
        ("colour", "a/3.png is RGB: a mask has one class per pixel"),
        ("bytes", r"a/3.png does not decode \(UnidentifiedImageError"),
        ("images", "no folder '.*val/images'"),
        ("empty", "val/images holds no image"),
        ("one", "classes.txt names 1 classes, not 2 to 255"),
        ("one\ntwo\n\none\n", "classes.txt names one twice"),
    ],
)
def test_bad_folders_are_named(tmp_path: Path, what: str, message: str) -> None:
    home = masked(tmp_path)
    spoil(home, what)
    with pytest.raises(DataError, match=message):
        found = folder_of_masks(home, "test")
        view = MaskedPhotoView(lambda image, mask: (torch.zeros(3, 4, 4), mask))
        for i in range(len(found)):
            TransformedImages(found, view)[i, 0]


def test_missing_classes_and_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="classes.txt': one name per line"):
        classes_of(tmp_path)
    with pytest.raises(DataError, match="data.path: no folder"):
        unmasked(tmp_path / "none", "train")


def test_a_mask_is_its_pixels(tmp_path: Path) -> None:
    image, file = tmp_path / "i.png", tmp_path / "m.png"
    Image.new("RGB", (3, 1)).save(image)
    for mode, wanted in (("L", [0, 1, IGNORE]), ("P", [0, 1, IGNORE]), ("1", [0, 1, 1])):
        drawn = Image.new(mode, (3, 1))
        if mode == "P":
            drawn.putpalette([grey for grey in range(256) for _ in range(3)])
        for x, value in enumerate((0, 1, 255)):
            drawn.putpixel((x, 0), value)
        drawn.save(file)
        assert read_mask(file, image, 2).tolist() == [wanted]


@pytest.mark.parametrize("augment", ["none", "flip", "crop"])
def test_a_mask_moves_with_its_image(tmp_path: Path, augment: str) -> None:
    found = folder_of_masks(masked(tmp_path), "train")
    model = unet(in_chans=3, num_classes=2)
    data = TransformedImages(found, masked_view_of(model, "masks", 16, augment))
    moved = 0
    for i in range(len(found)):
        for epoch in range(4):
            image, mask, _ = data[i, epoch]
            assert image.shape == (3, 16, 16) and mask.shape == (16, 16)
            assert type(mask) is torch.Tensor and mask.dtype == torch.int64
            bright = image[0] > (image[0].max() + image[0].min()) / 2
            agree = (bright == mask.bool()).double().mean()
            assert agree > 0.9 or mask.unique().numel() == 1
            moved += int(mask[8, 0] == 0 and mask.unique().numel() == 2)
    assert (moved > 0) == (augment != "none")


def test_the_strokes_of_the_digits() -> None:
    found = digit_masks("test")
    image, mask, i = TransformedImages(found, StrokeView(32, 1, "shift"))[7, 0]
    assert found.classes[0] == "background" and len(found.classes) == 11
    assert image.shape == (1, 32, 32) and i == 7
    assert mask.unique().tolist() == [0, found.labels[7] + 1]
    assert torch.equal(mask > 0, image[0] > 0) and 0.05 < (mask > 0).double().mean() < 0.5
    assert StrokeView(8, 3, "none")(found.load(7)).shape == (3, 8, 8)


def test_dice_and_iou_are_those_of_sets() -> None:
    score = MeanIoU(3, IGNORE)
    labels = torch.tensor([[[0, 0, 1, IGNORE]]])
    guess = torch.tensor([[[0, 1, 1, 1]]])
    score.update(torch.nn.functional.one_hot(guess, 3).permute(0, 3, 1, 2).double(), labels)
    assert score.per_class()[:2].tolist() == [0.5, 0.5] and score.per_class()[2].isnan()
    assert score.dice()[:2].tolist() == pytest.approx([2 / 3, 2 / 3])
