"""The safetensors blob, and in its header what PEFT's config has no words for.

``__metadata__["fused_lora"]`` is a JSON object: the layout's version, each module's groups with
their exact scales, and digests that tie the tensors to their config and to themselves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from fused_lora.io.errors import AdapterFileError
from fused_lora.io.fuse import Group
from fused_lora.io.peft import BLOCKS, DORA, READ
from fused_lora.types import Span
from fused_lora.version import __version__

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
