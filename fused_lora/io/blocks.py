"""PEFT's BdLora layout: of a block-diagonal b, the blocks alone, one below the other.

    dense    B = diag(b_q, b_k, b_v)    [N, 3 R]
    blocks   B = [b_q; b_k; b_v]        [N, R]        under the same key, a as before

Every block has as many rows and columns as every other, which is so for a fused qkv with one rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_lora.io.errors import AdapterFileError
from fused_lora.io.fuse import Group
from fused_lora.io.keys import b_key

LAYOUTS = ("dense", "blocks")


@dataclass(frozen=True)
class Blocks:
    """Which modules have it: those whose last name contains one of ``patterns``."""

    patterns: tuple[str, ...]
    count: int

    def holds(self, module: str) -> bool:
        """Whether ``module`` has its b in blocks, as PEFT decides it."""
        last = module.rpartition(".")[2]
        return any(pattern in last for pattern in self.patterns)


def blocks_of(noted: Any, where: str) -> Blocks | None:
    """The config's ``use_bdlora``; raises AdapterFileError for what cannot be read."""
    if not noted:
        return None
    known = {"target_modules_bd_a", "target_modules_bd_b", "nblocks", "match_strict"}
    if not isinstance(noted, dict) or set(noted) - known:
        raise AdapterFileError(f"{where}: use_bdlora is {noted!r}; its fields are {sorted(known)}")
    if noted.get("target_modules_bd_a"):
        raise AdapterFileError(
            f"{where}: use_bdlora has {noted['target_modules_bd_a']!r} in blocks of lora_A; blocks "
            "of lora_B alone can be loaded"
        )
    patterns, count = noted.get("target_modules_bd_b") or [], noted.get("nblocks", 1)
    words = isinstance(patterns, list) and all(isinstance(each, str) for each in patterns)
    if not words or type(count) is not int or count < 1:
        raise AdapterFileError(f"{where}: use_bdlora cannot be read: {noted!r}")
    return Blocks(tuple(patterns), count)


def dense(b: Tensor, blocks: Blocks, where: str) -> Tensor:
    """b [N, count R] of its blocks [N, R]."""
    if b.dim() != 2 or b.shape[0] % blocks.count:
        raise AdapterFileError(f"{where}: {tuple(b.shape)} are not {blocks.count} equal blocks")
    return torch.block_diag(*b.chunk(blocks.count))


def in_blocks(
    tensors: Mapping[str, Tensor], groups: Mapping[str, Sequence[Group]]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(the tensors in blocks, the config's ``use_bdlora``); AdapterFileError where it cannot be."""
    held = {name: each for name, each in groups.items() if len(each) > 1}
    if not held:
        raise AdapterFileError(
            'layout="blocks": no module has several adapters, which is what its blocks are; '
            f"{next(iter(groups))} has one"
        )
    counts = {len(each) for each in held.values()}
    blocks = Blocks(tuple(sorted({name.rpartition(".")[2] for name in held})), min(counts))
    if clash := [n for n in groups if blocks.holds(n) and n not in held] or len(counts) > 1:
        raise AdapterFileError(f'layout="blocks": {clash} would be read as {blocks} too')
    new = dict(tensors)
    for name, each in held.items():
        _check_equal(name, each, tensors[b_key(name)])
        new[b_key(name)] = _diagonal(tensors[b_key(name)], each)
    config = {
        "target_modules_bd_a": [],
        "target_modules_bd_b": list(blocks.patterns),
        "nblocks": blocks.count,
        "match_strict": False,
    }
    return new, config


def _check_equal(name: str, groups: Sequence[Group], b: Tensor) -> None:
    spans = [group.span for group in groups]
    edges = [0, *(span.stop for span in spans)]
    together = [span.start for span in spans] == edges[:-1] and edges[-1] == b.shape[0]
    alike = {
        (span.width, span.rank, group.scale) for span, group in zip(spans, groups, strict=True)
    }
    if not together or len(alike) > 1:
        raise AdapterFileError(
            f'layout="blocks": the adapters of {name} differ in columns, rank or scale, or leave '
            f"columns out: {[(g.name, g.span, g.scale) for g in groups]}"
        )


def _diagonal(b: Tensor, groups: Sequence[Group]) -> Tensor:
    rank = groups[0].span.rank
    rows = [b[g.span.start : g.span.stop, i * rank :][:, :rank] for i, g in enumerate(groups)]
    return torch.cat(rows)
