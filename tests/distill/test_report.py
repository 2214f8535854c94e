"""What a run leaves for people: a report, and a model that needs no library of ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fused_lora.distill import load_student
from fused_lora.distill.data.batches import Batch
from fused_lora.distill.report import REPORT, confusion_of, cost_of
from fused_lora.distill.run import distill
from tests.distill.runs import checkpoint, recipe, slad_recipe

LOADS = """
import sys, torch, timm
model = timm.create_model(f"local-dir:{sys.argv[1]}", pretrained=True).eval()
torch.save(model(torch.load(sys.argv[2])), sys.argv[3])
assert not any(name.startswith("fused_lora") for name in sys.modules)
"""


def test_the_export_loads_without_this_library(tmp_path: Path) -> None:
    teacher = {"checkpoint": checkpoint(tmp_path)}
    distill(recipe(teacher=teacher), tmp_path / "run")
    images = torch.randn(3, 1, 8, 8)
    torch.save(images, tmp_path / "images.pt")
    paths = [str(tmp_path / name) for name in ("run/timm", "images.pt", "logits.pt")]
    subprocess.run([sys.executable, "-c", LOADS, *paths], cwd=tmp_path, check=True)
    student = load_student(tmp_path / "run")
    assert len(student.blocks) == 2
    with torch.no_grad():
        wanted = student(images)
    assert torch.allclose(torch.load(paths[2]), wanted, atol=1e-6)


def test_transformers_loads_it_too(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    distill(recipe(teacher={"checkpoint": checkpoint(tmp_path)}), tmp_path / "run")
    kind = transformers.AutoModelForImageClassification
    model = kind.from_pretrained(str(tmp_path / "run" / "timm")).eval()
    images = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        wanted = load_student(tmp_path / "run")(images)
        assert torch.allclose(model(images).logits, wanted, atol=1e-6)
    assert list(model.config.id2label.values()) == [str(digit) for digit in range(10)]


def test_an_export_is_a_teacher_again(tmp_path: Path) -> None:
    distill(recipe(teacher={"checkpoint": checkpoint(tmp_path)}), tmp_path / "run")
    again = {"model": f"local-dir:{tmp_path / 'run' / 'timm'}", "options": {}, "pretrained": True}
    figures = distill(recipe(teacher=again), tmp_path / "again")["figures"]
    assert figures["steps"] == 6 and len(load_student(tmp_path / "again").blocks) == 1


def test_the_report_has_its_parts(tmp_path: Path) -> None:
    distill(recipe(teacher={"checkpoint": checkpoint(tmp_path)}), tmp_path / "run")
    page = (tmp_path / "run" / REPORT).read_text()
    for part in (
        "<h2>Loss</h2><svg",
        "student, before merging",
        "student, merged",
        "CKA of the blocks",
        "Student against teacher",
        "local-dir:",
    ):
        assert part in page
    assert "http" not in page.replace("http://www.w3.org", "")
    distill(slad_recipe(tmp_path, "two_step"), tmp_path / "slad")
    page = (tmp_path / "slad" / REPORT).read_text()
    assert "Loss of the phase teacher" in page and "Student against teacher" in page
    quiet = recipe(teacher={"checkpoint": checkpoint(tmp_path)}, evaluate={"report": False})
    distill(quiet, tmp_path / "quiet")
    assert not (tmp_path / "quiet" / REPORT).exists() and not (tmp_path / "quiet/timm").exists()


def test_a_student_that_timm_cannot_build_is_not_exported(tmp_path: Path) -> None:
    from fused_lora.distill.models import build
    from fused_lora.distill.recipe.tables import Teacher

    small = {"model": "resnet18", "options": {"in_chans": 1, "zero_init_last": False}}
    torch.save(build(Teacher(**small)).state_dict(), tmp_path / "resnet.pth")
    asked = recipe(
        teacher=small | {"checkpoint": str(tmp_path / "resnet.pth")},
        data={"image_size": 32},
        train={"steps": 1},
    )
    distill(asked, tmp_path / "run")
    assert "no plain export: timm does not build" in (tmp_path / "run" / REPORT).read_text()
    assert not (tmp_path / "run" / "timm").exists()


def test_confusion_counts_what_each_says() -> None:
    says = torch.tensor([[5.0, 0, 0], [5, 0, 0], [0, 5, 0], [0, 0, 5]])
    other = torch.tensor([[5.0, 0, 0], [0, 5, 0], [0, 5, 0], [0, 5, 0]])
    batch = Batch(torch.zeros(4, 1), torch.zeros(4), torch.arange(4), 1.0)
    heat = confusion_of(lambda x: says, lambda x: other, iter([batch]), ["a", "b", "c"])
    assert heat.values.tolist() == [[0.5, 0.5, 0], [0, 1, 0], [0, 1, 0]]
    assert "agree on 50.0%" in heat.note


def test_cost_counts_shared_weights_once() -> None:
    first, second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    second.weight = first.weight
    cost = cost_of("twins", nn.Sequential(first, second), torch.randn(4, 8))
    assert cost.parameters == 64 and cost.megabytes == pytest.approx(256 / 2**20)
    assert cost.batch_ms > 0 and cost.images == 4
