"""The launches that a plan makes, by name, shape and tile; tiles that were measured best."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fused_lora import disk, env
from fused_lora.kernels.triton import spills, tiles
from fused_lora.kernels.triton.available import identity
from fused_lora.kernels.triton.launch import architecture
from fused_lora.kernels.triton.tiles import BulkTile, GradTile, MergeTile, ThinTile, Tile
from fused_lora.plan.problem import Problem
from fused_lora.types import Backend, Forward, Gradient, Keep, Plan, ragged

# Tiles that were measured fastest on this device, kept by ``fused-lora tune`` in the cache folder.
#
#     tiles.json   {identity of device and versions: {"extended bfloat16 25216x768x768": {tile}}}
#
# A tile that this room no longer has, or that does not fit the chip, is passed over.


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
    rows = {name: asdict(tile) for name, tile in found.items()}
    disk.merge_table(path(), _here(device), rows)


@lru_cache(maxsize=64)
def _winners(device: torch.device) -> dict[str, MeasuredTile]:
    rows = disk.table(path(), lambda: _here(device))
    found = {name: _tile(name, row) for name, row in rows.items()}
    return {name: tile for name, tile in found.items() if tile is not None}


def _here(device: torch.device) -> str:
    return f"{FORMAT}|{identity(device)}"


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


# Which kernels are launched, each in which tile: what is verified is what runs.
#
# kernel            rows  columns  depth
# extended          M     N        K       or M, K, N for dx
# one_pass          M     N        K       likewise
# shrink            M     sum R    K       or N for dh
# grad              sum R K        M       or N for db
# merge             N     K        sum R
#
# extended_gelu     M     N        K       with GELU behind it, or its derivative behind dx
# extended_grads    M     K        N       dx with erf's derivative, and gradients of its tiles;
#                                          extended_grads_tanh, with that of tanh
# gelu_grads        M     K        0       erf's derivative with gradients of its tiles, and what
#                                          adds dh up; gelu_grads_tanh; none is ragged
# pack_grads        M     N        sum R   dy of q, k and v packed of three parts, with db and dh
# extended_scale    M     N        K       with LayerScale and a residual behind it
# extended_wide     M     N        K       likewise, either of them wider than x
# one_pass_scale    M     N        K       as extended_scale; one_pass_wide as extended_wide
# extended_fp8      M     N        K       of codes; forward alone
# extended_dropout  M     K        N       dx of a dropped x; N = 0 of the adapters alone
# shrink_dropout    M     sum R    K       of a dropped x
# grad_dropout      sum R K        M       likewise
# shrink_norm       M     sum R    K       LayerNorm, which makes x, and h of it
# shrink_gelu       M     sum R    K       GELU of both kinds, likewise
# expand_norm       M     sum R    D       dx of LayerNorm, with a low-rank term of its dy
# expand_residual   M     N        sum R   a residual and LayerScale, with a low-rank term of z
# border_weight     N     K        sum R   [w | s b], and [w ; a]
# merge_many        any                    every matrix of a table
# quantise          M     K                codes and scales of x
# layer_norm        M     D                forward, rebuilding and dx
# gelu              M     N                both kinds, and their derivatives
#
# The packing of a and b (border.py) has one tile, and is checked with each product that needs it.


PRODUCTS = ("extended", "one_pass")  # of a big matrix and of a border, in one accumulator
NO_PRODUCTS = (
    "layer_norm",
    "gelu",
    "border_weight",
    "merge_many",
    "quantise",
)  # or fp32 ones, whatever torch allows
AnyTile = MeasuredTile | tiles.RowTile | tiles.ElementTile | tiles.DerivativeTile


def extended_grads(activation: str) -> str:
    """Which launch of dx goes through this GELU's derivative and forms gradients: each has its own
    tile."""
    return "extended_grads" if activation == "erf" else f"extended_grads_{activation}"


def gelu_grads(activation: str) -> str:
    """Likewise, of this GELU's derivative alone."""
    return "gelu_grads" if activation == "erf" else f"gelu_grads_{activation}"


class Launch(NamedTuple):
    """A kernel in one tile."""

    kernel: str
    tile: AnyTile

    @property
    def configuration(self) -> str:
        """The tile in a few words, as tables show it."""
        sizes = [str(v) for k, v in vars(self.tile).items() if k.startswith("block")]
        if isinstance(self.tile, tiles.BulkTile) and self.tile.rest_n:
            sizes[1] += f"+{self.tile.rest_n}"
        form = "bulk " if self.bulk else ""
        return f"{form}{'x'.join(sizes)} {self.tile.stages} stages {self.tile.warps} warps"

    @property
    def bulk(self) -> bool:
        """Whether it reads by descriptors."""
        return isinstance(self.tile, tiles.BulkTile)

    @property
    def width(self) -> int:
        """Columns of the rows that it takes whole or in long blocks; 0 for a product."""
        if isinstance(self.tile, tiles.RowTile):
            return self.tile.block_d
        return 2 * self.tile.block_n if isinstance(self.tile, tiles.ElementTile) else 0


@lru_cache(maxsize=4096)
def tile_of(
    kernel: str,
    rows: int,
    columns: int,
    depth: int,
    dtype: torch.dtype,
    device: torch.device,
    ragged: bool = False,  # of a product with adapters; winners are measured without
) -> Any:
    """The tile of one launch, of its kernel's kind: a measured winner, else by this room's rule."""
    found = None if ragged else winner(kernel, rows, columns, depth, dtype, device)
    return found or by_rule(kernel, rows, columns, depth, dtype, device, ragged)


spills.heeded_by(tile_of.cache_clear)


def by_rule(
    kernel: str,
    rows: int,
    columns: int,
    depth: int,
    dtype: torch.dtype,
    device: torch.device,
    ragged: bool = False,
) -> Any:
    """The tile of one launch where nothing was measured, or what stands in for it."""
    best = _least_cost(kernel, rows, columns, depth, dtype, device, ragged)
    return stand_in(kernel, best, dtype, device, ragged)


def stand_in(
    kernel: str, tile: AnyTile, dtype: torch.dtype, device: torch.device, ragged: bool = False
) -> Any:
    """``tile``, or where it is known to spill the first after it that is not."""
    name = f"{kernel} ragged" if ragged else kernel
    order = in_its_place(kernel, tile, dtype, architecture(device), ragged)
    return spills.choose(name, order, spills.precision(dtype), device)


def in_its_place(
    kernel: str, tile: AnyTile, dtype: torch.dtype, arch: int, ragged: bool = False
) -> tuple[AnyTile, ...]:
    """``tile``, and what may stand in for it, in order: the candidates after it, then the others.

    A function of the tile alone, not of sizes: a check of one tile is one of what stands in for it.
    """
    name, _, suffix = kernel.partition("_")
    others: tuple[AnyTile, ...] = ()
    if suffix == "fp8":
        others = tiles.FP8
    elif kernel.startswith("gelu_grads"):
        assert isinstance(tile, tiles.DerivativeTile), tile
        others = tiles.gelu_grads_candidates(tile.block_n, arch)
    elif kernel == "pack_grads":
        assert isinstance(tile, tiles.ElementTile), tile
        others = tiles.pack_grads_candidates(tile.block_n, arch)
    elif suffix.startswith("grads"):
        others = tiles.extended_grads_candidates(arch)
    elif name == "extended":
        bulk = isinstance(tile, tiles.BulkTile)
        others = tiles.candidates(
            arch, dtype.itemsize, bool(suffix), bulk, suffix == "gelu", ragged
        )
    elif name == "one":
        others = tiles.one_pass_candidates(arch, dtype.itemsize, suffix != "pass", ragged)
    elif isinstance(tile, tiles.ThinTile | tiles.GradTile | tiles.MergeTile):
        others = (tiles.smaller(tile),)
    at = others.index(tile) + 1 if tile in others else 0
    return tuple(dict.fromkeys((tile, *others[at:], *others[:at])))


def _least_cost(
    kernel: str,
    rows: int,
    columns: int,
    depth: int,
    dtype: torch.dtype,
    device: torch.device,
    ragged: bool,
) -> Any:
    name, _, suffix = kernel.partition("_")
    size, dropout = dtype.itemsize, suffix == "dropout"
    if suffix == "fp8":
        return tiles.fp8_tile(rows, columns, device)
    if kernel.startswith("gelu_grads"):
        return tiles.gelu_grads_tile(columns, device)
    if kernel == "pack_grads":
        return tiles.pack_grads_tile(columns, device)
    if suffix.startswith("grads"):
        return tiles.extended_grads_tile(device)
    if name == "extended":
        rows_fit = depth * size % 16 == columns * size % 16 == 0  # as descriptors need them to be
        bulk = rows_fit and suffix not in ("dropout", "wide")  # which take registers
        how = (bool(suffix), device, bulk, suffix == "gelu", ragged)
        return tiles.gemm_tile(rows, columns, size, *how)
    if name == "one":
        return tiles.one_pass_tile(rows, columns, size, device, suffix != "pass", ragged)
    if name == "shrink":
        if suffix in ("norm", "gelu"):
            return tiles.row_shrink_tile(columns, suffix == "norm")
        return tiles.thin_tile(rows, columns, size, device, dropout)
    if name == "expand":
        return tiles.expand_tile(columns if suffix == "norm" else depth)
    if name == "grad":
        return tiles.grad_tile(rows, size, dropout)
    if name in ("layer", "quantise"):
        return tiles.row_tile(columns)
    if name == "border":
        return tiles.PACK
    return tiles.ELEMENTS if name == "gelu" else tiles.MergeTile()


def launches(
    problem: Problem, plan: Plan, dtype: torch.dtype, device: torch.device
) -> frozenset[Launch]:
    """What ``plan`` launches of this room for ``problem``, forward and backward."""
    if plan.backend is not Backend.TRITON:
        return frozenset()
    shapes = set(_shapes(problem, plan))
    uneven = {kernel: ragged(problem.spans) for kernel in PRODUCTS}
    return frozenset(
        Launch(s[0], tile_of(*s, dtype, device, uneven.get(s[0], False))) for s in shapes
    )


def _shapes(p: Problem, plan: Plan) -> Iterator[tuple[str, int, int, int]]:
    yield from _product(p, plan.forward, p.k, p.n, p.shrunk)
    if p.needs.x and plan.keep is not Keep.MERGED:
        yield from _product(p, plan.dx, p.n, p.k, plan.writes_dh or p.hidden_grad)
    if plan.gradient is not Gradient.RANK or plan.grads_by:
        return
    if p.needs.b:
        if plan.keep is not Keep.HIDDEN:
            yield "shrink", p.m, p.rank, p.k
        yield "grad", p.rank, p.n, p.m
    if p.needs.a:
        if not p.hidden_grad and (plan.dx is Forward.MERGE or not p.needs.x):
            yield "shrink", p.m, p.rank, p.n
        yield "grad", p.rank, p.k, p.m


def _product(
    p: Problem, strategy: Forward, depth: int, columns: int, given: bool
) -> Iterator[tuple[str, int, int, int]]:
    if strategy is Forward.MERGE:
        yield "merge", p.n, p.k, p.rank
        return
    if strategy is Forward.EXTENDED and not given:
        yield "shrink", p.m, p.rank, depth
    yield strategy.value, p.m, columns, depth
