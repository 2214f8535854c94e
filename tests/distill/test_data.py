"""Where images come from, which are chosen, in what order they are seen."""

from __future__ import annotations

import tarfile
from collections import Counter
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image

from fused_lora.distill.data.batches import Order, loaded
from fused_lora.distill.data.sets import (
    SOURCES,
    DataError,
    ImageSet,
    balanced,
    digits,
    folder,
    huggingface,
    located,
    only,
    spread,
    uniform,
)
from fused_lora.distill.data.views import ScanView, TransformedImages, photo_view

CONFIG = {
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "interpolation": "bicubic",
    "crop_pct": 0.9,
}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes, three images each, for training and for testing."""
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            home = tmp_path / split / label
            home.mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (40, 30), (80 * i, 90, 20)).save(home / f"{i}.png")
    return tmp_path


def test_digits_are_split_by_class_and_disjoint() -> None:
    train, test = digits("train"), digits("test")
    assert len(train) + len(test) == 1797
    assert max(Counter(test.labels).values()) - min(Counter(test.labels).values()) <= 2
    assert train.load(0).shape == (1, 8, 8) and train.load(0).dtype == torch.uint8
    assert int(torch.stack([train.load(i) for i in range(100)]).max()) == 255


def test_some_digits_of_all() -> None:
    low, high = (SOURCES[f"digits_{half}"]("", "train") for half in ("low", "high"))
    assert len(low) + len(high) == len(digits("train"))
    assert low.classes + high.classes == digits("train").classes
    assert set(high.labels) == {0, 1, 2, 3, 4}
    i = digits("train").labels.index(7)
    assert torch.equal(high.load(high.labels.index(2)), digits("train").load(i))
    assert low.name != high.name  # caches go by it


def test_some_classes_of_all(photos: Path) -> None:
    every = folder(photos, "train")
    dogs, both = only(every, ["dog"]), only(every, ["dog", "cat"])
    assert (dogs.labels, dogs.classes) == ([0, 0, 0], ["dog"])
    assert (both.labels, both.classes) == ([1, 1, 1, 0, 0, 0], ["dog", "cat"])
    assert dogs.load(1).tobytes() == every.load(4).tobytes() and dogs.files[1] == every.files[4]
    assert len({every.name, dogs.name, both.name}) == 3
    with pytest.raises(DataError, match=r"data.classes: .* has no class \['emu'\]; .*'cat', 'dog'"):
        only(every, ["dog", "emu"])
    with pytest.raises(DataError, match=r"names a class twice: \['dog', 'dog'\]"):
        only(every, ["dog", "dog"])


def test_a_balanced_choice_is_nested_seeded_and_never_without_a_class() -> None:
    labels = digits("train").labels
    few, more = balanced(labels, 0.01, 0), balanced(labels, 0.1, 0)
    assert set(few) < set(more) and few == balanced(labels, 0.01, 0)
    assert few != balanced(labels, 0.01, 1)
    assert set(Counter(labels[i] for i in few).values()) == {1}
    counts = Counter(labels[i] for i in more).values()
    assert max(counts) - min(counts) <= 1
    assert balanced(labels, 1.0, 0) == list(range(len(labels)))


def test_a_uniform_choice_is_seeded_and_of_the_asked_size() -> None:
    few = uniform(1000, 0.0025, 0)
    assert len(set(few)) == 2 and few == uniform(1000, 0.0025, 0) and max(few) < 1000
    assert few != uniform(1000, 0.0025, 1)
    assert len(uniform(1000, 0.0001, 0)) == 1


def test_kmeans_plus_plus_spreads() -> None:
    centres = torch.arange(5.0).repeat_interleave(20)[:, None] * 100
    features = centres + torch.randn(100, 1)
    chosen = spread(features, 0.05, 0)
    assert sorted(i // 20 for i in chosen) == [0, 1, 2, 3, 4]
    assert chosen == spread(features, 0.05, 0)
    with pytest.raises(DataError, match="non-finite"):
        spread(features * torch.inf, 0.05, 0)


@pytest.mark.parametrize("count, batch, accumulate", [(40, 8, 1), (37, 4, 2), (3, 8, 2), (5, 1, 3)])
def test_two_processes_see_what_one_sees(count: int, batch: int, accumulate: int) -> None:
    one = Order(range(count), 2 * batch, accumulate)
    two = Order(range(count), batch, accumulate, processes=2)
    assert one.steps_per_epoch == two.steps_per_epoch
    for step in range(2 * one.steps_per_epoch):
        alone, shared = Counter(), Counter()
        for keys, weight in one.step(step, 0):
            alone.update({key: weight / len(keys) for key in keys})
        for process in range(2):
            for keys, weight in two.step(step, process):
                shared.update({key: weight / len(keys) / 2 for key in keys})
        assert {k: pytest.approx(v) for k, v in alone.items() if v} == {
            k: v for k, v in shared.items() if v
        }
        assert sum(alone.values()) == pytest.approx(1)


def test_an_epoch_holds_every_image_once_and_each_has_its_own_order() -> None:
    order = Order(range(10, 47), 8)
    epochs = [[keys for s in range(5) for keys, _ in order.step(e * 5 + s, 0)] for e in range(2)]
    flat = [[i for keys in epoch for i, _ in keys] for epoch in epochs]
    assert sorted(flat[0]) == sorted(flat[1]) == list(range(10, 47)) and flat[0] != flat[1]


def test_batches_start_anywhere_and_do_not_depend_on_workers() -> None:
    data = TransformedImages(digits("train"), ScanView(8, 1, "shift"), seed=1)
    order = Order(range(20), 8, accumulate=2)
    whole = list(loaded(data, order, range(3)))
    later = list(loaded(data, order, range(2, 3), workers=1))
    for one, other in zip(whole[2], later[0], strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.rows, other.rows)
    assert not torch.equal(data[0, 0][0], data[0, 1][0])


def test_an_image_that_does_not_decode(photos: Path) -> None:
    (photos / "train" / "cat" / "1.png").write_bytes(b"no image")
    images = folder(photos, "train")
    view = photo_view(16, 3, "crop", CONFIG)
    with pytest.raises(DataError, match=r"cat/1.png does not decode .*'skip'"):
        TransformedImages(images, view)[1, 0]
    skipping = TransformedImages(images, view, bad_images="skip")
    ((batch,),) = loaded(skipping, Order(range(6), 6), range(1))
    assert batch.skipped == 1 and batch.images.shape == (5, 3, 16, 16)
    assert batch.weight == pytest.approx(5 / 6) and 1 not in batch.rows
    with pytest.raises(DataError, match="none of the 1 images of a batch decodes"):
        list(loaded(skipping, Order([1], 1), range(1)))


def test_folders_that_cannot_be_used(photos: Path) -> None:
    assert folder(photos, "test").classes == ["cat", "dog"]
    with pytest.raises(DataError, match="no folder '.*nowhere'"):
        folder(photos / "nowhere", "train")
    with pytest.raises(DataError, match="no folder train in it; there are"):
        folder(photos / "train", "train")
    (photos / "train" / "emu").mkdir()
    with pytest.raises(DataError, match="no images of the class emu"):
        folder(photos, "train")
    (photos / "train" / "emu" / "notes.txt").write_text("none")
    with pytest.raises(DataError, match="emu"):
        folder(photos, "train")


def packed(photos: Path, name: str, mode: str) -> Path:
    """The folder as a tar archive within another folder of it."""
    with tarfile.open(photos / name, mode) as archive:
        for split in ("train", "val"):
            archive.add(photos / split, f"pets/{split}")
    return photos / name


@pytest.mark.parametrize(("name", "mode"), [("p.tar.gz", "w:gz"), ("p.tar", "w")])
def test_an_archive_is_the_folder(photos: Path, name: str, mode: str) -> None:
    (photos / "train" / "cat" / "notes.txt").write_text("no image")
    path = packed(photos, name, mode)
    for split in ("train", "test"):
        one, other = folder(path, split), folder(photos, split)
        assert (one.labels, one.classes) == (other.labels, other.classes)
        assert one.load(2).tobytes() == other.load(2).tobytes()
    with pytest.raises(DataError, match=r"p.tar.*cat/0.png does not decode"):
        (photos / "train" / "cat" / "0.png").write_bytes(b"x")
        bad = folder(packed(photos, name, mode), "train")
        TransformedImages(bad, photo_view(16, 3, "none", CONFIG))[0, 0]


def test_archives_that_cannot_be_used(photos: Path) -> None:
    (photos / "bad.tar.gz").write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"bad.tar.gz is no tar archive"):
        folder(photos / "bad.tar.gz", "train")
    whole = packed(photos, "p.tar.gz", "w:gz").read_bytes()
    (photos / "half.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"half.tar.gz is no tar archive"):
        folder(photos / "half.tar.gz", "train")
    with tarfile.open(photos / "flat.tar", "w") as archive:
        archive.add(photos / "train" / "cat", "cat")
    with pytest.raises(DataError, match=r"no images in train/<class>/; it has"):
        folder(photos / "flat.tar", "train")


def test_a_path_from_the_environment(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PETS", str(photos))
    assert located("$PETS") == str(photos) and located("a/$PETSX") == "a/$PETSX"
    with pytest.raises(DataError, match=r"data.path = '\$NOWHERE': the environment has no"):
        located("$NOWHERE")


def test_views_are_those_of_the_seed() -> None:
    images = ImageSet("one", [0], ["a"], lambda i: Image.new("L", (20, 20), 100))
    view = photo_view(16, 3, "flip", CONFIG)
    assert TransformedImages(images, view)[0, 0][0].shape == (3, 16, 16)
    assert ScanView(16, 3, "none")(torch.zeros(1, 8, 8, dtype=torch.uint8)).shape == (3, 16, 16)
    with pytest.raises(ValueError, match="'crop' is for photographs"):
        ScanView(8, 1, "crop")


def test_a_shift_moves_a_photograph_by_an_eighth_at_most() -> None:
    ramp = Image.fromarray(torch.arange(16).repeat(16, 1).mul(10).to(torch.uint8).numpy(), "L")
    images = ImageSet("one", [0], ["a"], lambda i: ramp)
    view = photo_view(16, 1, "shift", CONFIG | {"crop_pct": 1.0})
    seen = [(TransformedImages(images, view)[0, epoch][0][0, 8] + 1) * 127.5 for epoch in range(40)]
    centres = {round(float(row.sort().values[7]) / 10) for row in seen}  # mirrored or not
    assert len(centres) > 2 and centres <= set(range(5, 11))


def test_a_huggingface_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    import pyarrow

    def save(folder: str, splits: list[str], **columns: list) -> None:
        kinds = {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b"])}
        features = datasets.Features({name: kinds[name] for name in columns})
        table = pyarrow.Table.from_pydict(columns, schema=features.arrow_schema)
        info = datasets.DatasetInfo(features=features)
        rows = datasets.Dataset(datasets.table.InMemoryTable(table), info, fingerprint="rows")
        datasets.DatasetDict(dict.fromkeys(splits, rows)).save_to_disk(str(tmp_path / folder))

    pictures = []
    for i in range(4):
        Image.new("RGB", (9, 7), (40 * i, 0, 0)).save(file := BytesIO(), "png")
        pictures.append({"bytes": file.getvalue(), "path": None})
    save("set", ["train", "validation"], picture=pictures, kind=[0, 1, 1, 0])
    images = huggingface(tmp_path / "set", "train")
    assert (images.labels, images.classes) == ([0, 1, 1, 0], ["a", "b"])
    assert images.load(2).getpixel((0, 0)) == (80, 0, 0)
    assert len(huggingface(tmp_path / "set", "test")) == 4
    save("bare", ["train"], picture=pictures)
    with pytest.raises(DataError, match="no column of type ClassLabel"):
        huggingface(tmp_path / "bare", "train")
    with pytest.raises(DataError, match=r"no split \['validation', 'val', 'test'\]; it has"):
        huggingface(tmp_path / "bare", "test")
    with pytest.raises(DataError, match="no folder '.*none'"):
        huggingface(tmp_path / "none", "train")
