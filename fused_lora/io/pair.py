"""The two files of an adapter, written so that nobody ever reads halves of two adapters.

Where the config's bytes stay the same, as from checkpoint to checkpoint, only the tensors are
replaced, in one step. Where they change, the old config goes away first and the new one comes last:

    staged    new tensors, new config       in .saving-* inside the folder, flushed to disk
    out       config, then tensors          to .saving-*; from here no reader finds a config
    in        tensors, then config          the pair is complete again
    an error in between puts the old pair back; after a crash the config is absent, not mismatched
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from fused_lora.io.errors import AdapterFileError

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
STAGING = ".saving-"


def write_pair(folder: Path, config: bytes, tensors: bytes) -> None:
    """Put both files into ``folder``, made if need be; other files in it stay.

    Raises:
        AdapterFileError: ``folder`` or one of its parents is a file.
        OSError: from the file system; the old pair is back in place.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise AdapterFileError(f"{folder}: a file is in the way, a folder is needed") from None
    staging = Path(tempfile.mkdtemp(prefix=STAGING, dir=folder))
    try:
        new = {TENSORS: tensors}
        if not _holds(folder / CONFIG, config):
            new[CONFIG] = config
        for name, content in new.items():
            _write(staging / name, content)
        _swap(folder, staging, new)
        _flush(folder)
    except BaseException:
        if not any(staging.glob("old-*")):  # else it holds the only copy of the old pair
            shutil.rmtree(staging, ignore_errors=True)
        raise
    shutil.rmtree(staging, ignore_errors=True)


def _swap(folder: Path, staging: Path, new: Mapping[str, bytes]) -> None:
    moves = [(staging / name, folder / name) for name in new]  # the config last
    if CONFIG in new:
        old = [name for name in (CONFIG, TENSORS) if (folder / name).exists()]
        moves = [(folder / name, staging / f"old-{name}") for name in old] + moves
    done: list[tuple[Path, Path]] = []
    try:
        for source, destination in moves:
            os.replace(source, destination)
            done.append((source, destination))
    except BaseException:
        for source, destination in reversed(done):
            os.replace(destination, source)
        raise


def read_pair(folder: Path) -> tuple[bytes, bytes]:
    """(config, tensors); raises AdapterFileError naming what is not there."""
    if not folder.is_dir():
        kind = "is a file, not a folder" if folder.exists() else "does not exist"
        raise AdapterFileError(f"{folder} {kind}")
    for name in (CONFIG, TENSORS):
        if not (folder / name).is_file():
            raise AdapterFileError(f"{folder / name} is missing{_hint(folder, name)}")
    return (folder / CONFIG).read_bytes(), (folder / TENSORS).read_bytes()


def _hint(folder: Path, name: str) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    if name == TENSORS and "adapter_model.bin" in names:
        return "; adapter_model.bin is a pickle, which is never read: save it as safetensors"
    if left := [each for each in names if each.startswith(STAGING)]:
        return f"; {left[0]} holds what an interrupted save left"
    return f"; the folder holds {names[:8]}"


def _holds(path: Path, content: bytes) -> bool:
    with suppress(OSError):
        return path.read_bytes() == content
    return False


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _flush(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
