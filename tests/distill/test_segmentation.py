"""Runs on masks: students of U-Nets, what is refused, windows over large images, scores."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from fused_lora.distill import load_student
from fused_lora.distill.evaluate import likeness
from fused_lora.distill.models import load
from fused_lora.distill.recipe import RecipeError
from fused_lora.distill.report import text
from fused_lora.distill.run import distill
from fused_lora.distill.segmentation import MeanIoU, SegmentRun, sliding_window
from fused_lora.distill.stack import tokens_of
from fused_lora.distill.train.devices import World
from tests.distill.runs import CLASSES, MODEL, UNET, segmenting, unet


def test_wecolora_leaves_an_ordinary_smaller_unet(tmp_path: Path) -> None:
    wanted = {"cosine": True, "teacher": True}
    said = distill(segmenting(tmp_path, evaluate=wanted), tmp_path / "run")
    figures = said["figures"]
    assert figures["steps"] == 6 and figures["images"] == 70
    assert all(0 <= figures[name] <= 1 for name in ("miou", "dice"))
    assert set(figures["iou"]) <= {"background", *"0123456789"}
    assert set(figures["teacher"]) == {"miou", "dice", "iou"}
    assert next(iter(figures["cosine"])) == "encoder.layer1.0" and "miou" in text(said)
    student, teacher = load_student(tmp_path / "run"), unet()
    assert [len(student.encoder.layer1), len(student.encoder.layer2)] == [2, 2]
    mine, theirs = student.state_dict(), teacher.state_dict()
    assert not torch.equal(
        mine["encoder.layer1.0.conv1.weight"], theirs["encoder.layer1.0.conv1.weight"]
    )
    for same in ("head.weight", "encoder.conv1.weight", "encoder.bn1.running_mean"):
        assert torch.equal(mine[same], theirs[same])
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "tables",
    [
        {"method": "weco"},
        {"method": "weco_kd", "loss": {"labels": 0.5}},
        {"loss": {"labels": 1.0}, "student": {"trainable": ["^decoder", "^head"]}},
        {"data": {"choice": "kmeans++", "augment": "shift"}, "loss": {"blocks": "last"}},
        {"loss": {"cache": "memory", "blocks": "every"}, "train": {"precision": "fp64"}},
        {"train": {"precision": "bf16"}},
    ],
    ids=str,
)
def test_methods(tmp_path: Path, tables: dict) -> None:
    asked = segmenting(tmp_path, **{"train": {"steps": 3}} | tables)
    assert 0 <= distill(asked, tmp_path / "run")["figures"]["miou"] <= 1
    before = {name: value for name, value in unet().state_dict().items()}
    after = load_student(tmp_path / "run").state_dict()
    head = not torch.equal(after["head.weight"].float(), before["head.weight"])
    stem = not torch.equal(after["encoder.conv1.weight"].float(), before["encoder.conv1.weight"])
    mean = not torch.equal(
        after["encoder.bn1.running_mean"].float(), before["encoder.bn1.running_mean"]
    )
    everything = tables.get("method") == "weco_kd"
    assert stem == everything and mean == everything
    assert head == bool(tables.get("loss", {}).get("labels"))


def test_a_teacher_recipe_is_run_first(tmp_path: Path) -> None:
    inner = segmenting(tmp_path, method="finetune", train={"steps": 2, "batch_size": 8})
    options = "\n".join(f"{key} = {json.dumps(value)}" for key, value in UNET.items())
    (tmp_path / "t.toml").write_text(
        f'method = "finetune"\n[teacher]\nmodel = "unet"\n[teacher.options]\n{options}\n'
        '[data]\nsource = "digit_masks"\nimage_size = 16\n[train]\nsteps = 2\nbatch_size = 8\n'
    )
    assert inner.teacher.options["num_classes"] == CLASSES
    teacher = {"model": "", "options": {}, "checkpoint": "", "recipe": str(tmp_path / "t.toml")}
    figures = distill(segmenting(tmp_path, teacher=teacher), tmp_path / "run")["figures"]
    assert figures["steps"] == 6
    assert load_student(tmp_path / "t").num_classes == CLASSES


def test_likeness_of_maps_is_over_their_channels(tmp_path: Path) -> None:
    asked = segmenting(tmp_path)
    run = SegmentRun(asked, tmp_path, World())
    batch = next(run.once(run.test, range(3)))
    table = likeness(run.teacher, run.teacher, iter([batch]), 7)  # one block of each stage
    _, (kept, skipped) = tokens_of(
        run.teacher, batch.images, ["encoder.layer1.0", "encoder.layer1.2"]
    )
    wanted = torch.cosine_similarity(kept.double(), skipped.double(), dim=1).mean().item()
    row = table["encoder.layer1.0"]
    assert row["encoder.layer1.0"] == pytest.approx(1.0)
    assert row["encoder.layer1.2"] == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"teacher": {"model": "resnet18", "options": {"in_chans": 1}}}, r"puts out \(8, 1000\)"),
        ({"teacher": {"options": UNET | {"num_classes": 3}}}, r"\(8, 3, 16, 16\).*11 classes"),
        ({"teacher": {"checkpoint": "", "pretrained": True}}, "encoder of 'unet' alone"),
        ({"student": {"targets": ["q"]}}, r"student.targets = \('q',\) is for the projections"),
        ({"student": {"dropout": 0.5}}, "student.dropout = 0.5 is for the projections"),
        ({"evaluate": {"knn": 3}}, "knn = 3 are for labels, and data.source = 'digit_masks'"),
        ({"evaluate": {"probe": "sgd"}}, "evaluate.probe = 'sgd'"),
        ({"method": "slad", "slad": MODEL}, "slad has labels, and data.source = 'digit_masks'"),
        ({"data": {"path": "x"}}, "source 'digit_masks' and path 'x'"),
        ({"data": {"augment": "crop"}}, "scans take 'shift'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses(tmp_path: Path, monkeypatch, tables: dict, message: str) -> None:
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda *args, **options: None)
    with pytest.raises(ValueError, match=message):
        about = dict(tables)
        if "teacher" in about:
            model = about["teacher"].get("model", "unet")
            options = UNET | {"num_classes": CLASSES} if model == "unet" else {}
            about["teacher"] = {"options": options} | about["teacher"]
            if "checkpoint" not in about["teacher"]:
                about["teacher"]["checkpoint"] = of_teacher(tmp_path, about["teacher"])
        distill(segmenting(tmp_path, **about), tmp_path / "run")


def of_teacher(folder: Path, table: dict) -> str:
    """A file of the weights of a teacher's own shape."""
    from fused_lora.distill.models import build
    from fused_lora.distill.recipe.tables import Teacher

    about = Teacher(model=table.get("model", "unet"), options=table["options"])
    torch.save(build(about).state_dict(), folder / "own.pth")
    return str(folder / "own.pth")


def test_wrapped_weights_fit_a_model_with_an_encoder(tmp_path: Path) -> None:
    model = unet()
    wrapped = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save(wrapped, tmp_path / "wrapped.pth")
    fresh = unet(num_classes=CLASSES)
    torch.nn.init.zeros_(fresh.encoder.conv1.weight)
    load(fresh, tmp_path / "wrapped.pth")
    assert torch.equal(fresh.encoder.conv1.weight, model.encoder.conv1.weight)


def test_a_recipe_error_is_one(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="data.source must be one of"):
        segmenting(tmp_path, data={"source": "mask"})


def test_a_unet_of_the_library_from_a_recipe(tmp_path: Path) -> None:
    pytest.importorskip("segmentation_models_pytorch")
    from fused_lora.distill.models import build
    from fused_lora.distill.recipe.tables import Teacher

    given = {"encoder_name": "tu-resnet18", "encoder_depth": 3, "decoder_channels": [16, 8, 8]}
    given |= {"in_channels": 1, "num_classes": CLASSES}
    torch.save(build(Teacher(model="smp/Unet", options=given)).state_dict(), tmp_path / "smp.pth")
    teacher = {"model": "smp/Unet", "options": given, "checkpoint": str(tmp_path / "smp.pth")}
    asked = segmenting(tmp_path, teacher=teacher, train={"steps": 2, "log_every": 1})
    assert distill(asked, tmp_path / "run")["figures"]["steps"] == 2
    assert len(load_student(tmp_path / "run").encoder.model.layer2) == 1


class TestSlidingWindow:
    @pytest.mark.parametrize(
        ("size", "window", "stride"), [((8, 8), 8, 8), ((11, 13), 4, 3), ((9, 5), 5, 5)]
    )
    def test_a_prediction_per_pixel_comes_back(self, size, window, stride):
        images = torch.randn(2, 3, *size, dtype=torch.float64)
        seen = []

        def predict(part):
            seen.append(part.shape)
            return torch.cat([part, part.sum(1, keepdim=True)], 1)

        torch.testing.assert_close(sliding_window(predict, images, window, stride), predict(images))
        assert set(seen[:-1]) == {(2, 3, window, window)}

    def test_overlaps_are_averaged(self):
        calls = iter([10.0, 20.0, 40.0])
        images = torch.zeros(1, 1, 2, 5, dtype=torch.float64)  # windows from columns 0, 2 and 3
        y = sliding_window(lambda part: part + next(calls), images, 2, 2)
        assert y[0, 0, 0].tolist() == [10.0, 10.0, 20.0, 30.0, 40.0]

    @pytest.mark.parametrize(
        ("window", "stride", "message"),
        [
            (4, 5, "stride must lie in 1 to window = 4, got 5"),
            (4, 0, "got 0"),
            (9, 1, "images of 8 x 12 are smaller than a window of 9"),
        ],
    )
    def test_bad_windows(self, window, stride, message):
        with pytest.raises(ValueError, match=message):
            sliding_window(lambda part: part, torch.zeros(1, 3, 8, 12), window, stride)

    def test_predictions_of_another_size(self):
        with pytest.raises(ValueError, match=r"predictions are \(1, 3, 2, 2\), the window 4"):
            sliding_window(lambda part: part[..., ::2, ::2], torch.zeros(1, 3, 8, 8), 4, 4)


class TestMeanIoU:
    def test_by_hand(self):
        score = MeanIoU(4)
        guess = torch.tensor([[[0, 0, 1], [1, 2, 2]]])
        labels = torch.tensor([[[0, 1, 1], [1, 255, 2]]])
        logits = torch.nn.functional.one_hot(guess, 4).movedim(-1, 1).float()
        for _ in range(2):  # twice the same changes nothing
            score.update(logits, labels)
        *known, absent = score.per_class().tolist()
        assert known == [1 / 2, 2 / 3, 1.0]
        assert math.isnan(absent)
        assert score.mean() == pytest.approx((1 / 2 + 2 / 3 + 1) / 3)

    def test_what_does_not_fit(self):
        score = MeanIoU(3)
        labels = torch.zeros(1, 2, 2, dtype=torch.int64)
        with pytest.raises(ValueError, match=r"logits \(1, 4, 2, 2\) .* do not fit 3 classes"):
            score.update(torch.zeros(1, 4, 2, 2), labels)
        with pytest.raises(ValueError, match=r"labels \(1, 2, 3\)"):
            score.update(torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 3, dtype=torch.int64))
        with pytest.raises(ValueError, match="labels run from 0 to 3, classes to 2"):
            labels[0, 0, 0] = 3
            score.update(torch.zeros(1, 3, 2, 2), labels)
        assert not score.confusion.any()
