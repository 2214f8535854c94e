"""Rows kept on disk by key: read whole, replaced whole, so that no reader meets half a file."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read(path: Path) -> dict[str, Any]:
    """The rows of ``path``; none where it is absent, torn or no table of rows."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return rows if isinstance(rows, dict) else {}


def merge(path: Path, rows: Mapping[str, Any]) -> None:
    """Add ``rows`` to those of ``path``; a folder that cannot be written is passed over.

    Of two processes that add at the same moment one may lose its rows, never the file its form.
    """
    name = None
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(read(path) | dict(rows), file, indent=1)
        Path(name).replace(path)
        return
    if name:  # a full disk
        Path(name).unlink(missing_ok=True)
