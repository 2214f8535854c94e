"""Tiles that were measured fastest on this device, kept by ``fused-lora tune`` in the cache folder.

    tiles.json   {identity of device and versions: {"extended bfloat16 25216x768x768": {tile}}}

A tile that this room no longer has, or that does not fit the chip, is passed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import torch

from fused_lora import disk, env
from fused_lora.kernels.triton.identity import identity
from fused_lora.kernels.triton.tiles import BulkTile, GradTile, MergeTile, ThinTile, Tile

MeasuredTile = Tile | ThinTile | GradTile | MergeTile
FORMAT = "tiles 1"
KINDS: dict[str, type[MeasuredTile]] = {
    "extended": Tile,
    "one_pass": Tile,
    "shrink": ThinTile,
    "grad": GradTile,
    "merge": MergeTile,
}


def path() -> Path:
    """The file of winners."""
    return env.cache_dir() / "tiles.json"


def key(kernel: str, rows: int, columns: int, depth: int, dtype: torch.dtype) -> str:
    """What a winner is kept under."""
    return f"{kernel} {str(dtype).removeprefix('torch.')} {rows}x{columns}x{depth}"


def winner(
    kernel: str, rows: int, columns: int, depth: int, dtype: torch.dtype, device: torch.device
) -> MeasuredTile | None:
    """The measured tile of exactly this shape; None where none was."""
    return _winners(device).get(key(kernel, rows, columns, depth, dtype))


def store(device: torch.device, found: Mapping[str, MeasuredTile]) -> None:
    """Keep ``found`` by key beside what the file has for ``device``; heard at the next start."""
    here = f"{FORMAT}|{identity(device)}"
    kept = disk.read(path()).get(here)
    rows = (kept if isinstance(kept, dict) else {}) | {k: asdict(t) for k, t in found.items()}
    disk.merge(path(), {here: rows})


@lru_cache(maxsize=64)
def _winners(device: torch.device) -> dict[str, MeasuredTile]:
    rows = disk.read(path())
    kept = rows.get(f"{FORMAT}|{identity(device)}") if rows else None
    tiles = {name: _tile(name, row) for name, row in kept.items()} if isinstance(kept, dict) else {}
    return {name: tile for name, tile in tiles.items() if tile is not None}


def _tile(name: str, row: object) -> MeasuredTile | None:
    kind = KINDS.get(name.split(" ")[0])
    if kind is None or not isinstance(row, dict):
        return None
    if not all(isinstance(size, int) and size >= 0 for size in row.values()):
        return None
    kind = BulkTile if "rest_n" in row else kind
    try:
        return kind(**row)
    except TypeError:  # a knob that came or went
        return None
