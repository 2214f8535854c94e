"""distill: a recipe from its teacher to its figures, in one folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fused_lora.distill.recipe.tables import SEGMENTED, Recipe
from fused_lora.distill.results import RESULT, TEACHER, finished
from fused_lora.distill.runner import Run
from fused_lora.distill.student import ABOUT
from fused_lora.distill.train.fit import LAST
from fused_lora.distill.train.world import World, world


def distill(recipe: Recipe, folder: str | Path, fresh: bool = False) -> dict[str, Any]:
    """Run ``recipe``: teacher, student, training, merge, figures.

    A run that was killed goes on from its last checkpoint; a finished one is not run again. The
    folder then holds ``student.safetensors`` with ``student.json`` (see ``load_student``),
    ``last.safetensors``, ``log.jsonl`` and ``result.json``.

    Args:
        recipe: what ``fused_lora.distill.recipe.read`` returned.
        folder: of this run alone; made if it is not there.
        fresh: begin anew, whatever the folder holds.

    Returns:
        What ``result.json`` says: recipe, figures, seconds.

    Raises:
        RecipeError, DataError, WeightsError, CheckpointError: all of them ValueError or
            RuntimeError, with what is wrong and the values seen.
        Diverged: the loss is no number any more; the last good checkpoint is kept.
    """
    folder = Path(folder)
    with world() as here:
        if fresh and here.first:
            for name in (LAST, RESULT, ABOUT, "log.jsonl"):
                (folder / name).unlink(missing_ok=True)
                (folder / TEACHER / name).unlink(missing_ok=True)
        here.wait()
        if done := here.agree(finished(folder, recipe)):
            return done
        return run_of(recipe, folder, here).result()


def run_of(recipe: Recipe, folder: Path, here: World) -> Run:
    """The run of the recipe's method."""
    if recipe.data.source in SEGMENTED:
        from fused_lora.distill.segment_run import SegmentRun

        return SegmentRun(recipe, folder, here)
    if recipe.method == "family":
        from fused_lora.distill.family import FamilyRun

        return FamilyRun(recipe, folder, here)
    if recipe.method != "slad":
        return Run(recipe, folder, here)
    from fused_lora.distill.slad_run import SladRun

    return SladRun(recipe, folder, here)
