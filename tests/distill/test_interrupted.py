"""Any phase that is killed, or meets an unreadable image or a NaN, goes on to the same bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fused_lora.distill.data.sets import DataError
from fused_lora.distill.models import read
from fused_lora.distill.recipe import Recipe
from fused_lora.distill.run import distill
from fused_lora.distill.train.checkpoint import header_of
from fused_lora.distill.train.fit import LAST, Diverged, Fit
from tests.distill.runs import checkpoint, recipe, segmenting, slad_recipe
from tests.distill.test_family import family

SEEN = {"data": {"augment": "shift"}}  # every epoch has views of its own
STEPS = list(range(6))
PHASES: dict[str, Callable[[Path], Recipe]] = {
    "wecolora": lambda at: recipe(teacher={"checkpoint": checkpoint(at)}, **SEEN),
    "weco_kd": lambda at: recipe(method="weco_kd", teacher={"checkpoint": checkpoint(at)}, **SEEN),
    "finetune": lambda at: recipe(method="finetune", **SEEN),
    "family": lambda at: family(at, **SEEN),
    "joint": lambda at: slad_recipe(at, "joint", **SEEN),
    "two_step": lambda at: slad_recipe(at, "two_step", **SEEN),
    "probe": lambda at: slad_recipe(at, "probe", **SEEN),
    "finetuned teacher": lambda at: slad_recipe(at, "finetune", **SEEN),
    "segmentation": lambda at: segmenting(at, **SEEN),
    "segmentation, finetune": lambda at: segmenting(at, method="finetune", **SEEN),
}
IN_TWO = ("two_step", "probe", "finetuned teacher")  # the teacher's phase lies in teacher/
SAVED = 3  # runs.recipe saves at the steps 3 and 6


def unreadable(i: int) -> None:
    raise OSError("truncated")


def stops_at(monkeypatch: pytest.MonkeyPatch, phase: int, how: str) -> list[int]:
    """Stop the fit number ``phase`` of a run at its fifth step; back come the steps it took."""
    step, begin, steps, fits = Fit._step, Fit.run, [], []

    def stopping(fit: Fit, number: int, micro: list) -> None:
        if len(fits) - 1 == phase:
            steps.append(number)
            if number == 4 and how == "killed":
                raise KeyboardInterrupt
            if number == 4 and how == "nan":
                micro = [replace(each, images=each.images * torch.nan) for each in micro]
            if number == 4 and how == "unreadable":
                fit.data.images = replace(fit.data.images, load=unreadable, files=())
        step(fit, number, micro)

    def counted(fit: Fit) -> int:
        fits.append(fit)
        return begin(fit)

    monkeypatch.setattr(Fit, "_step", stopping)
    monkeypatch.setattr(Fit, "run", counted)
    return steps


@pytest.mark.parametrize("case", PHASES)
def test_whatever_stops_a_phase_it_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    asked = PHASES[case](tmp_path)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    figures = distill(asked, whole)["figures"]
    last_good = "the last good checkpoint is .*last.safetensors, of step 3"
    errors = {
        "killed": (KeyboardInterrupt, None),
        "unreadable": (DataError, r"image \d+ of .*train.* does not decode \(OSError: truncated\)"),
        "nan": (Diverged, f"the loss of step 5 is nan at lr .*; {last_good}"),
    }
    for phase in range(1 + (case in IN_TWO)):
        home = broken / "teacher" if case in IN_TWO and not phase else broken
        for how, (error, message) in errors.items():
            with monkeypatch.context() as patched, pytest.raises(error, match=message):
                steps = stops_at(patched, phase, how)
                distill(asked, broken)
            assert steps == {"killed": STEPS[:5], "unreadable": [3, 4], "nan": [3, 4, 5]}[how]
            assert header_of(home / LAST)["step"] == SAVED
            assert not (broken / "result.json").exists()
    assert distill(asked, broken)["figures"] == figures
    files = {path.relative_to(whole) for path in whole.rglob("*.safetensors")}
    assert len(files) >= 2 + 2 * (case in IN_TWO)
    for file in files:
        one, other = (read(home / file) for home in (broken, whole))
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("case", PHASES)
def test_a_missing_folder_is_named(tmp_path: Path, case: str) -> None:
    source = "masks" if case.startswith("segmentation") else "folder"
    asked = PHASES[case](tmp_path)
    away = replace(asked.data, source=source, path=str(tmp_path / "none"), augment="none")
    with pytest.raises(DataError, match="data.path: no folder '.*none'|no '.*none/classes.txt'"):
        distill(replace(asked, data=away), tmp_path / "run")
    assert not (tmp_path / "run").exists()
