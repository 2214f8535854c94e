"""Two files of one adapter: the header that binds them, written together or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fused_lora.arguments import brief
from fused_lora.io.fuse import Group
from fused_lora.io.keys import AdapterFileError
from fused_lora.io.peft import BLOCKS, DORA, READ
from fused_lora.types import Span
from fused_lora.version import __version__

# The safetensors blob, and in its header what PEFT's config has no words for.
#
# ``__metadata__["fused_lora"]`` is a JSON object: the layout's version, each module's groups with
# their exact scales, and digests that tie the tensors to their config and to themselves.


KEY = "fused_lora"
LAYOUT = 1  # of the header's object


@dataclass(frozen=True)
class Content:
    """A safetensors file: its tensors, and the groups if this library wrote it."""

    tensors: dict[str, Tensor]
    groups: dict[str, tuple[Group, ...]] = field(default_factory=dict)


def pack(
    tensors: Mapping[str, Tensor],
    groups: Mapping[str, Iterable[Group]],
    config: Mapping[str, Any],
) -> bytes:
    """The blob of ``tensors`` that goes with ``config``."""
    from safetensors.torch import save

    held = {key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}
    header = {
        "layout": LAYOUT,
        "version": __version__,
        "config_sha256": config_digest(config),
        "tensors_sha256": _tensors_digest(save(held)),
        "groups": {name: [asdict(group) for group in each] for name, each in groups.items()},
    }
    return save(held, metadata={"format": "pt", KEY: json.dumps(header)})


def unpack(blob: bytes, config: Mapping[str, Any], where: str) -> Content:
    """The content of a blob; raises AdapterFileError if it is damaged or not ``config``'s."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(blob)
    except (SafetensorError, ValueError, KeyError) as error:
        raise AdapterFileError(f"{where}: no whole safetensors file: {error}") from None
    noted = json.loads(blob[8 : _start(blob)]).get("__metadata__", {}).get(KEY)
    if noted is None:
        return Content(tensors)
    try:
        header = json.loads(noted)
        _check(header, blob, config, where)
        return Content(tensors, _groups(header["groups"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, AdapterFileError):
            raise
        raise AdapterFileError(f"{where}: header {KEY!r} cannot be read: {error!r}") from None


def _check(header: dict[str, Any], blob: bytes, config: Mapping[str, Any], where: str) -> None:
    if header["layout"] != LAYOUT:
        raise AdapterFileError(
            f"{where}: layout {header['layout']!r}, written by fused_lora {header['version']}; "
            f"this is {__version__}, which reads layout {LAYOUT}"
        )
    for name, found in (
        ("config_sha256", config_digest(config)),
        ("tensors_sha256", _tensors_digest(blob)),
    ):
        if header[name] != found:
            raise AdapterFileError(
                f"{where}: {name} is {found[:12]}, but {header[name][:12]} was saved: the config "
                "and the tensors were not written together, or were changed since"
            )


def config_digest(config: Mapping[str, Any]) -> str:
    """SHA-256 of the fields of a config that decide what the tensors mean."""
    deciding = {key: config.get(key) or None for key in ("peft_type", "target_modules", *READ)}
    for key in (BLOCKS, DORA):  # absent from what earlier releases wrote
        if value := config.get(key):
            deciding[key] = value
    for key, value in deciding.items():
        if isinstance(value, list):
            deciding[key] = sorted(map(str, value))
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


def _tensors_digest(blob: bytes) -> str:
    return hashlib.sha256(memoryview(blob)[_start(blob) :]).hexdigest()


def _start(blob: bytes) -> int:
    return 8 + int.from_bytes(blob[:8], "little")


def _groups(noted: dict[str, list[dict[str, Any]]]) -> dict[str, tuple[Group, ...]]:
    return {
        name: tuple(Group(**{**group, "span": Span(**group["span"])}) for group in each)
        for name, each in noted.items()
    }


# The two files of an adapter, written so that nobody ever reads halves of two adapters.
#
# Where the config's bytes stay the same, as from checkpoint to checkpoint, only the tensors are
# replaced, in one step. Where they change, the old config goes away first and the new one comes
# last:
#     staged    new tensors, new config       in .saving-* inside the folder, flushed to disk
#     out       config, then tensors          to .saving-*; from here no reader finds a config
#     in        tensors, then config          the pair is complete again
#     an error in between puts the old pair back; after a crash the config is absent, not mismatched


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
    if not os.path.isdir(folder):  # of names too long for a file system as well
        kind = "is a file, not a folder" if os.path.exists(folder) else "does not exist"
        raise AdapterFileError(f"folder {brief(str(folder))} {kind}")
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
