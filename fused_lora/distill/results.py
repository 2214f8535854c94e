"""``result.json``: what a finished run says of itself."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fused_lora.distill.recipe.read import plain
from fused_lora.distill.recipe.tables import Recipe

RESULT = "result.json"
TEACHER = "teacher"  # folder of a phase in which the teacher alone learns


def finished(folder: Path, recipe: Recipe) -> dict[str, Any] | None:
    """The result in ``folder``, if it is of this recipe."""
    said = read_result(folder)
    return said if said and said["recipe"] == json.loads(json.dumps(plain(recipe))) else None


def read_result(folder: Path) -> dict[str, Any] | None:
    """The result in ``folder``; None while there is none."""
    path = folder / RESULT
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def write_result(folder: Path, said: dict[str, Any]) -> None:
    """Put it there, whole or not at all."""
    beside = folder / f"{RESULT}.part"
    beside.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, folder / RESULT)
