"""A recipe from end to end: every method, caches, the figures, the folder it leaves."""

from __future__ import annotations

import copy
import json
import re
from itertools import product
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from fused_lora import cli
from fused_lora.distill import load_student
from fused_lora.distill.data.batches import Batch
from fused_lora.distill.data.sets import DataError
from fused_lora.distill.evaluate import likeness, neighbours, sgd
from fused_lora.distill.models import WeightsError, build, read
from fused_lora.distill.recipe import Recipe, RecipeError
from fused_lora.distill.recipe.tables import Teacher
from fused_lora.distill.run import Run, distill
from fused_lora.distill.stack import tokens_of
from fused_lora.distill.train.devices import World
from fused_lora.distill.train.fit import LAST
from tests.distill.runs import MODEL, OPTIONS, checkpoint, recipe, slad_recipe


@pytest.fixture
def teacher(tmp_path: Path) -> dict:
    return {"checkpoint": checkpoint(tmp_path)}


def images(recipe: Recipe, folder: Path) -> Batch:
    return next(Run(recipe, folder, World()).once(Run(recipe, folder, World()).test))


def test_wecolora_leaves_an_ordinary_smaller_model(tmp_path: Path, teacher: dict) -> None:
    asked = recipe(teacher=teacher, evaluate={"probe": "logistic", "knn": 5, "cosine": True})
    said = distill(asked, tmp_path / "run")
    figures = said["figures"]
    assert figures["steps"] == 6 and figures["images"] == 70
    assert all(0 <= figures[name] <= 1 for name in ("head", "probe", "knn"))
    assert list(figures["cosine"]) == ["blocks.0", "blocks.1"]
    student = load_student(tmp_path / "run")
    assert len(student.blocks) == 2 and type(student.blocks[0].attn.qkv) is torch.nn.Linear
    untrained = load_student_of(asked, tmp_path)
    x = images(asked, tmp_path).images
    assert not torch.allclose(student(x), untrained(x))
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == said


def load_student_of(asked: Recipe, folder: Path) -> torch.nn.Module:
    """The copied layers as they were before training."""
    from fused_lora.distill import copy_layers

    return copy_layers(build(asked.teacher), 2).eval()


def test_a_finished_run_is_not_run_again(tmp_path: Path, teacher: dict) -> None:
    asked = recipe(teacher=teacher)
    first = distill(asked, tmp_path / "run")
    stamp = (tmp_path / "run" / "last.safetensors").stat().st_mtime_ns
    assert distill(asked, tmp_path / "run") == first
    assert (tmp_path / "run" / "last.safetensors").stat().st_mtime_ns == stamp
    more = distill(recipe(teacher=teacher, evaluate={"knn": 3}), tmp_path / "run")
    assert "knn" in more["figures"] and more["figures"]["head"] == first["figures"]["head"]
    distill(asked, tmp_path / "run", fresh=True)
    assert (tmp_path / "run" / "last.safetensors").stat().st_mtime_ns != stamp


@pytest.mark.parametrize(
    ("method", "tables"),
    [
        ("weco", {}),
        ("weco_kd", {}),
        ("weco_kd", {"loss": {"labels": 1.0}, "student": {"keep": "first"}}),
        ("wecolora", {"loss": {"blocks": "every"}}),
        ("wecolora", {"loss": {"labels": 1.0}, "student": {"trainable": ["^head"]}}),
        ("wecolora", {"loss": {"tokens": 0.0, "labels": 1.0}, "student": {"targets": ["q", "v"]}}),
        ("wecolora", {"data": {"choice": "kmeans++"}}),
        ("wecolora", {"data": {"choice": "random"}}),
        ("wecolora", {"data": {"augment": "shift"}, "train": {"accumulate": 2}}),
        ("wecolora", {"train": {"precision": "bf16"}}),
        ("wecolora", {"train": {"precision": "fp64"}, "student": {"qkv": "joint"}}),
    ],
)
def test_methods(tmp_path: Path, teacher: dict, method: str, tables: dict) -> None:
    asked = recipe(method=method, **{"teacher": teacher, **tables})
    distill(asked, tmp_path / "run")
    student, before = load_student(tmp_path / "run"), load_student_of(asked, tmp_path)
    moved = [
        name
        for (name, one), (_, other) in zip(
            student.named_parameters(), before.named_parameters(), strict=True
        )
        if not torch.equal(one.float(), other)
    ]
    if method == "weco":
        assert not moved
    elif method == "weco_kd":
        assert "patch_embed.proj.weight" in moved
        assert ("norm.weight" in moved) == ("labels" in tables.get("loss", {}))
    else:
        assert "blocks.1.attn.qkv.weight" in moved and "pos_embed" not in moved
        assert ("head.weight" in moved) == ("trainable" in tables.get("student", {}))


@pytest.mark.parametrize("blocks", ["last", "every"])
def test_a_cached_teacher_is_the_teacher(tmp_path: Path, teacher: dict, blocks: str) -> None:
    finals = []
    for cache in ("off", "memory", "disk", "disk"):
        asked = recipe(
            teacher=teacher,
            loss={"cache": cache, "blocks": blocks},
            train={"precision": "fp64", "steps": 9},
        )
        distill(asked, tmp_path / cache, fresh=True)
        finals.append(read(tmp_path / cache / "student.safetensors"))
    assert len(list((tmp_path / "disk" / "features").glob("*.json"))) == 1
    for other in finals[1:]:
        assert all(torch.allclose(finals[0][k], other[k], rtol=1e-9) for k in finals[0])
    assert all(torch.equal(finals[2][k], finals[3][k]) for k in finals[2])


def test_a_teacher_recipe_is_run_first(tmp_path: Path) -> None:
    (tmp_path / "t.toml").write_text(
        'method = "finetune"\n[teacher]\nmodel = "vit_tiny_patch16_224"\n[teacher.options]\n'
        + "\n".join(f"{key} = {value}" for key, value in MODEL["options"].items())
        + '\n[data]\naugment = "shift"\n[train]\nsteps = 4\nblr = 0.1\n'
    )
    (tmp_path / "s.toml").write_text(
        '[teacher]\nrecipe = "t.toml"\n[student]\nrank = 2\n[train]\nsteps = 3\nbatch_size = 8\n'
    )
    command = ["distill", str(tmp_path / "s.toml"), "--out", str(tmp_path / "runs" / "s")]
    assert cli.main([*command, "--set", "data.fraction=0.02"]) == 0
    assert len(load_student(tmp_path / "runs" / "t").blocks) == 4
    assert len(load_student(tmp_path / "runs" / "s").blocks) == 2
    stamp = (tmp_path / "runs" / "t" / "result.json").stat().st_mtime_ns
    assert cli.main([*command, "--fresh", "--set", "data.fraction=0.03"]) == 0
    assert (tmp_path / "runs" / "t" / "result.json").stat().st_mtime_ns == stamp


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "s.toml").write_text('[teacher]\nmodel = "vit_tiny_patch16_224"\n')
    assert cli.main(["distill", str(tmp_path / "none.toml")]) == 2
    assert "no recipe" in capsys.readouterr().err
    command = ["distill", str(tmp_path / "s.toml"), "--out", str(tmp_path / "s")]
    for override, message in [
        ("student.rank=0", "student.rank must lie in [1, 4096], got 0"),
        ("train.steps=3", "teacher.model 'vit_tiny_patch16_224' has no weights"),
        ("teacher.checkpoint=none.pth", "no weights"),
        ("teacher.model=vit_tony", "teacher.model = 'vit_tony'"),
        ("train.device=tpu9", "train.device = 'tpu9'"),
    ]:
        assert cli.main([*command, "--set", override]) == 2
        assert message in capsys.readouterr().err


def test_the_command_stops_with_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint(tmp_path)
    options = ", ".join(f"{key} = {value}" for key, value in OPTIONS.items())
    (tmp_path / "s.toml").write_text(
        f'[teacher]\nmodel = "{MODEL["model"]}"\ncheckpoint = "{path}"\noptions = {{ {options} }}\n'
        "[student]\nrank = 2\n[data]\nfraction = 0.05\n[train]\nsteps = 9\nlog_every = 1\n"
    )
    command = ["distill", str(tmp_path / "s.toml"), "--out", str(tmp_path / "s"), "--set"]
    assert cli.main([*command, "data.source=folder", f"data.path={tmp_path / 'none'}"]) == 2
    assert "data.path: no folder" in capsys.readouterr().err
    monkeypatch.delenv("PHOTOS", raising=False)
    assert cli.main([*command, "data.source=folder", "data.path=$PHOTOS"]) == 2
    assert "the environment has no variable of that name" in capsys.readouterr().err
    assert cli.main([*command, "train.blr=1e30", "train.save_every=1", "train.warmup=0"]) == 2
    assert re.search(r"loss of step .* last good checkpoint is .* of step", capsys.readouterr().err)
    assert (tmp_path / "s" / LAST).is_file() and not (tmp_path / "s" / "result.json").exists()


def test_likeness_is_the_cosine_of_tokens(tmp_path: Path, teacher: dict) -> None:
    asked = recipe(teacher=teacher)
    model = build(asked.teacher).eval()
    batch = images(asked, tmp_path)
    student = load_student_of(asked, tmp_path)
    table = likeness(student, model, iter([batch]), 2)
    assert table["blocks.0"]["blocks.0"] == pytest.approx(1.0)
    _, (mine,) = tokens_of(student, batch.images, ["blocks.1"])
    _, (theirs,) = tokens_of(model, batch.images, ["blocks.3"])
    wanted = F.cosine_similarity(mine.double(), theirs.double(), dim=-1).mean().item()
    assert table["blocks.1"]["blocks.3"] == pytest.approx(wanted)
    assert list(table["blocks.1"]) == ["blocks.2", "blocks.3"]


def test_probes_read_what_is_there() -> None:
    labels = torch.arange(200) % 4
    features = F.one_hot(labels, 4).float() + 0.1 * torch.randn(200, 4)
    half = (features[:100], labels[:100], features[100:], labels[100:])
    assert sgd(*half) == 1.0 and neighbours(*half, count=500) == 1.0
    assert sgd(torch.zeros(100, 4), half[1], torch.zeros(100, 4), half[3]) == 0.25


def test_weights_that_do_not_fit(tmp_path: Path, teacher: dict) -> None:
    from safetensors.torch import save_file

    asked = recipe(teacher=teacher)
    good = read(Path(asked.teacher.checkpoint))
    path = tmp_path / "w.safetensors"

    def refused(tensors: dict, message: str) -> None:
        save_file(tensors, str(path))
        with pytest.raises(WeightsError, match=message):
            build(recipe(teacher={"checkpoint": str(path)}).teacher)

    refused({k: v for k, v in good.items() if k != "norm.bias"}, r"missing \['norm.bias'\]")
    refused(good | {"norm.bias": torch.zeros(3)}, r"norm.bias is \(3,\), the model's \(16,\)")
    refused(good | {"norm.bias": torch.full((16,), torch.nan)}, "norm.bias holds non-finite")
    torch.save({"model": {f"module.{k}": v for k, v in good.items()}}, tmp_path / "w.pth")
    wrapped = build(recipe(teacher={"checkpoint": str(tmp_path / "w.pth")}).teacher)
    assert torch.equal(wrapped.norm.bias, good["norm.bias"])
    (tmp_path / "bad.pth").write_bytes(b"x")
    with pytest.raises(WeightsError, match=r"bad.pth: "):
        build(recipe(teacher={"checkpoint": str(tmp_path / "bad.pth")}).teacher)
    with pytest.raises(WeightsError, match="holds no finished run"):
        load_student(tmp_path)


def test_a_head_that_cannot_learn_is_refused(tmp_path: Path, teacher: dict) -> None:
    asked = recipe(teacher=teacher, student={"trainable": ["^head"]})
    with pytest.raises(RecipeError, match=r"head.weight.* loss.labels is 0"):
        distill(asked, tmp_path / "run")


def test_two_results_are_the_same(tmp_path: Path, teacher: dict) -> None:
    asked = recipe(teacher=teacher)
    ends = []
    for name in "ab":
        distill(copy.deepcopy(asked), tmp_path / name)
        ends.append(read(tmp_path / name / "student.safetensors"))
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_slad_trains_both_through_the_same_adapters(tmp_path: Path, accumulate: int) -> None:
    asked = slad_recipe(
        tmp_path,
        train={"accumulate": accumulate, "precision": "fp64", "steps": 8},
        evaluate={"knn": 3},
    )
    said = distill(asked, tmp_path / "run")["figures"]
    assert {"head", "knn", "teacher"} <= set(said) and set(said["teacher"]) == {"head"}
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert set(json.loads(lines[0])) == {"step", "student", "teacher", "agreement", "loss", "lr"}
    assert losses[-1] < losses[0]
    student, before = load_student(tmp_path / "run"), build(asked.slad)
    one, other = (m.blocks[1].attn.qkv.weight.double() for m in (student, before))
    assert not torch.equal(one, other)
    heads = read(tmp_path / "run" / "heads.safetensors")
    assert {name.partition(".")[0] for name in heads} == {"student", "teacher"}


@pytest.mark.parametrize("method", ["two_step", "probe", "finetune"])
def test_the_ablations_of_slad_train_the_teacher_first(tmp_path: Path, method: str) -> None:
    asked = slad_recipe(tmp_path, method, evaluate={"cka": True})
    said = distill(asked, tmp_path / "run")["figures"]
    assert said["steps"] == 12 and {"head", "cka"} <= set(said)
    assert list(said["cka"]) == ["blocks.0", "blocks.1"]
    assert list(said["cka"]["blocks.1"]) == ["blocks.2"]  # even: 1 of 2 is 2 of 4
    assert all(0 < value <= 1 for row in said["cka"].values() for value in row.values())
    first, second = (read(tmp_path / "run" / home / LAST) for home in ("teacher", "."))
    of = lambda tensors: {n.split(".")[2] for n in tensors if n.startswith("param.both")}  # noqa: E731
    assert of(second) == {"student", "student_head"}
    assert of(first) == {"teacher_head"} | ({"teacher"} if method != "probe" else set())
    whole = any(name.startswith("param.both.teacher.patch_embed") for name in first)
    assert whole == (method == "finetune")
    assert set(said["cka_before"]) == set(said["cka"])


def test_a_resnet_student_learns_by_convlora(tmp_path: Path) -> None:
    small = {"model": "resnet18", "options": {"in_chans": 1, "zero_init_last": False}}
    weights = tmp_path / "resnet.pth"
    torch.save(build(Teacher(**small)).state_dict(), weights)
    asked = recipe(
        teacher=small | {"checkpoint": str(weights)},
        data={"image_size": 32},
        train={"steps": 4, "blr": 1e-2},
    )
    distill(asked, tmp_path / "run")
    student = load_student(tmp_path / "run")
    assert [len(getattr(student, f"layer{i}")) for i in (1, 2, 3, 4)] == [1, 1, 1, 1]
    before = load_student_of(asked, tmp_path)
    moved = student.layer2[0].conv1.weight, before.layer2[0].conv1.weight
    assert not torch.equal(*moved)
    assert torch.equal(student.conv1.weight, before.conv1.weight)


def test_a_folder_of_photographs_with_one_that_does_not_decode(tmp_path: Path) -> None:
    for split, label, i in product(("train", "val"), ("cat", "dog"), range(6)):
        home = tmp_path / "photos" / split / label
        home.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 16), (40 * i, 90, 200 * (label == "cat"))).save(home / f"{i}.png")
    (tmp_path / "photos" / "train" / "cat" / "0.png").write_bytes(b"no image")
    small = {"model": MODEL["model"], "options": MODEL["options"] | {"in_chans": 3}}
    torch.save(build(Teacher(**small)).state_dict(), tmp_path / "t.pth")
    asked = {
        "teacher": small | {"checkpoint": str(tmp_path / "t.pth")},
        "data": {"source": "folder", "path": str(tmp_path / "photos"), "fraction": 1.0},
        "train": {"steps": 4, "batch_size": 6},
    }
    with pytest.raises(DataError, match=r"cat/0.png does not decode"):
        distill(recipe(**asked), tmp_path / "run")
    for cache in ("off", "memory"):
        tables = asked | {"loss": {"cache": cache}}
        tables["data"] = asked["data"] | {"bad_images": "skip"}
        figures = distill(recipe(**tables), tmp_path / cache)["figures"]
        assert figures["skipped"] == 2 and figures["steps"] == 4


def test_some_classes_are_a_task_of_their_own(tmp_path: Path, teacher: dict) -> None:
    """As SLAD's recipes take them: learned and tested on, numbered from 0."""
    asked = slad_recipe(tmp_path, data={"classes": ["7", "2"]})
    run = Run(asked, tmp_path / "run", World())
    assert run.images.classes == run.test.classes == ["7", "2"]
    figures = distill(asked, tmp_path / "run")["figures"]
    assert figures["images"] == len(run.chosen()) == 14
    with pytest.raises(DataError, match=r"digits train has no class \['ten'\]"):
        Run(recipe(teacher=teacher, data={"classes": ["ten"]}), tmp_path / "ten", World())
