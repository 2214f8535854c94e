"""Rows kept on disk by key: read whole, replaced whole, so that no reader meets half a file."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any


def read(path: Path) -> dict[str, Any]:
    """The rows of ``path``; none where it is absent, torn or no table of rows."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return rows if isinstance(rows, dict) else {}


def table(path: Path, key: Callable[[], str]) -> dict[str, Any]:
    """The row of this key where it is a table of rows itself; ``key`` is asked if there are any."""
    rows = read(path)
    found = rows.get(key()) if rows else None
    return found if isinstance(found, dict) else {}


def merge(path: Path, rows: Mapping[str, Any]) -> None:
    """Add ``rows`` to those of ``path``; a folder that cannot be written is passed over.

    Writers take turns. Where the file system has no locks, one of two that write at the same moment
    may lose its rows, never the file its form.
    """
    _change(path, lambda: dict(rows))


def merge_table(path: Path, key: str, rows: Mapping[str, Any]) -> None:
    """Add ``rows`` to the table that is the row of this key, likewise."""
    _change(path, lambda: {key: table(path, lambda: key) | dict(rows)})


def _change(path: Path, rows: Callable[[], dict[str, Any]]) -> None:
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _turn(path.parent):
            _replace(path, json.dumps(read(path) | rows(), indent=1))


@contextlib.contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """Inside, no other process writes into ``folder`` by this function."""
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _replace(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).replace(path)
    except OSError:  # a full disk
        Path(name).unlink(missing_ok=True)
        raise
