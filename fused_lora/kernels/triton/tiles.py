"""Which configuration a kernel runs in: a few candidates per architecture, one rule that chooses.

Integers in, a frozen dataclass out. Every candidate is compiled for its architecture by the tests:
no spilled registers, shared memory within the chip's limit, the chip's matrix instruction present.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

import torch

from fused_lora.kernels.triton.launch import architecture, multiprocessors
from fused_lora.types import Span

SHARED_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
LEAST_SHARED_KIB = 99  # of any chip from sm_80 on
CONTRACTED = {"enable_fp_fusion": True}  # a b + c rounds once; the default differs by version


def shared_bytes(arch: int) -> int:
    """What one block may use on sm_``arch``."""
    return SHARED_KIB.get(arch, LEAST_SHARED_KIB) << 10


@dataclass(frozen=True)
class Tile:
    """How the extended GEMM is cut."""

    block_m: int  # rows of y per program
    block_n: int  # columns of y per program
    block_k: int  # columns of x per step
    stages: int  # steps that shared memory holds at once
    warps: int
    group_m: int = 8  # rows of tiles walked together, for L2

    @property
    def width(self) -> int:
        """Columns of y per program."""
        return self.block_n

    def fits(self, arch: int, itemsize: int, heavy: bool = False) -> bool:
        """Whether a block of sm_``arch`` holds the stages and its threads the accumulators.

        A heavy epilogue, of more than a bias, takes about as many registers again as the
        accumulator it ends.
        """
        step_bytes = (self.block_m + self.width) * self.block_k * itemsize
        of_a_thread = [self.block_m * n // (32 * self.warps) for n in (self.width, self.block_n)]
        holds = self.stages * step_bytes <= shared_bytes(arch)
        return holds and of_a_thread[0] + heavy * of_a_thread[1] <= (160 if heavy else 128)

    def arguments(self) -> dict[str, int | bool]:
        """The kernel's constants and Triton's options."""
        return _arguments(self)


@dataclass(frozen=True)
class BulkTile(Tile):
    """How the persistent form is cut; a second accumulator lets tiles be 128 + 64 columns wide."""

    rest_n: int = 0  # columns of the second accumulator

    @property
    def width(self) -> int:
        """Columns of y per tile."""
        return self.block_n + self.rest_n


@dataclass(frozen=True)
class ThinTile:
    """How a product with a border on the right is cut: [M, C] by [C, sum R]."""

    block_m: int  # rows of x per program
    block_r: int  # ranks per program
    block_c: int  # columns of x per step
    stages: int  # steps that shared memory holds at once
    warps: int
    registers: int = 0  # per thread at most, where ptxas would rather spill; 0 leaves it to choose

    def arguments(self) -> dict[str, int | bool]:
        """The kernel's constants and Triton's options."""
        return _arguments(self)


@dataclass(frozen=True)
class GradTile:
    """How a product over rows is cut: [M, sum R]T by [M, C]."""

    block_r: int  # ranks per program
    block_c: int  # columns per program
    block_m: int  # rows per step
    stages: int  # steps that shared memory holds at once
    warps: int

    def arguments(self) -> dict[str, int | bool]:
        """The kernel's constants and Triton's options."""
        return _arguments(self)


@dataclass(frozen=True)
class MergeTile:
    """How w' = w + s b a is cut; fp32 products, so small in ranks."""

    block_n: int = 64  # rows of w per program
    block_k: int = 64  # columns of w per program
    block_r: int = 16  # ranks per step
    stages: int = 2  # steps that shared memory holds at once
    warps: int = 8

    def arguments(self) -> dict[str, int | bool]:
        """The kernel's constants and Triton's options."""
        return _arguments(self)


@dataclass(frozen=True)
class ElementTile:
    """How an elementwise pass over [M, N] is cut."""

    block_m: int = 4  # rows per program
    block_n: int = 512  # columns per program: 16 bytes a thread and row in 16 bits
    stages: int = 1
    warps: int = 4

    def arguments(self) -> dict[str, int | bool]:
        """The kernel's constants and Triton's options."""
        return _arguments(self)


@dataclass(frozen=True)
class DerivativeTile:
    """How GELU's derivative that forms gradients is cut."""

    block_m: int  # rows per step
    block_n: int  # columns per program
    shares: int  # of those columns, each multiplied by b by itself; their products are added
    stages: int
    warps: int

    def arguments(self) -> dict[str, int | bool]:
        """The kernel's constants and Triton's options."""
        return _arguments(self)


@dataclass(frozen=True)
class RowTile:
    """How a pass that needs whole rows is cut."""

    block_m: int  # rows per program
    block_d: int  # a power of two that holds a row
    warps: int
    stages: int = 1

    def arguments(self) -> dict[str, int | bool]:
        """The kernel's constants and Triton's options."""
        return _arguments(self)


def smaller(tile: ThinTile | GradTile | MergeTile) -> ThinTile | GradTile | MergeTile:
    """What stands in for ``tile`` where it spills: half as many rows or columns a program."""
    if isinstance(tile, ThinTile):
        return replace(tile, block_m=tile.block_m // 2)
    if isinstance(tile, GradTile):
        return replace(tile, block_c=tile.block_c // 2)
    return replace(tile, block_k=tile.block_k // 2)


ELEMENTS = ElementTile()
PACK = ElementTile(16, 128)  # of a border, and of w beside one
MOST_WIDTH = 16384  # of a row that registers hold
MOST_ROW_RANKS = 64  # sum R whose h is formed where x is made


def row_tile(columns: int) -> RowTile:
    """About 16 elements of each operand per thread."""
    block = power_of_two(columns, 16, MOST_WIDTH)
    return RowTile(max(1, 2048 // block), block, 4 if block <= 2048 else min(block // 512, 16))


def _arguments(
    tile: Tile | ThinTile | GradTile | MergeTile | ElementTile | DerivativeTile | RowTile,
) -> dict[str, int | bool]:
    fields = asdict(tile)
    options = {"num_stages": fields.pop("stages"), "num_warps": fields.pop("warps")}
    if registers := fields.pop("registers", 0):
        options["maxnreg"] = registers
    return {name.upper(): value for name, value in fields.items()} | options | CONTRACTED


SAFE = Tile(128, 128, 64, 3, 8)  # compiles without spills on every architecture

_DEEP = Tile(128, 128, 64, 4, 8)  # where one block fills a multiprocessor anyhow
_NARROW = (Tile(128, 64, 64, 3, 8), Tile(64, 64, 64, 3, 4))
_SMALL = Tile(32, 32, 32, 3, 4)
# fp32 operands: in four warps ragged ranks spill 8 bytes on sm_80, and on sm_120 with Triton 3.6
# (in eight, 32 columns of x deep, 16 with 3.9); dx does on sm_100 without TF32.
_SINGLE: dict[int, tuple[Tile, ...]] = {
    80: (Tile(64, 64, 32, 3, 8), _SMALL),
    90: (Tile(64, 64, 32, 3, 4), _SMALL),
    100: (_SMALL,),
    120: (Tile(64, 64, 16, 3, 8), _SMALL),
}
_HALF: dict[int, tuple[Tile, ...]] = {
    80: (SAFE, *_NARROW),
    90: (Tile(128, 256, 64, 3, 8), SAFE, _DEEP, *_NARROW),
    100: (Tile(128, 256, 64, 3, 8), _DEEP, *_NARROW),
    120: (SAFE, *_NARROW),
}


def _family(arch: int) -> int:
    """The last architecture up to ``arch`` that has tiles of its own."""
    return max((known for known in _HALF if known <= arch), default=80)


# The persistent form where the kernel report has it before pointers: half the cycles a step, about,
# at 128 x 256, and 192 columns, which pointers do not have. At 128 x 128 two blocks of pointers
# share a multiprocessor on sm_90, and on sm_120 as many as of the persistent form.
_LARGE = (BulkTile(128, 256, 64, 3, 8), BulkTile(128, 128, 64, 3, 8, rest_n=64))
_BULK: dict[int, tuple[BulkTile, ...]] = {80: (), 90: _LARGE, 100: _LARGE, 120: ()}
_SINGLE_BULK = {100: (BulkTile(64, 64, 32, 4, 8),)}  # where pointers have 32 x 32 alone
# GELU or its derivative is seen to spill here in spite of the rule, 8 to 136 bytes.
_SPILLS: dict[int, tuple[Tile, ...]] = {
    90: (_LARGE[1], *_SINGLE[90][:1]),
    100: (_NARROW[0], _LARGE[1]),
    120: (SAFE,),
}
# Several adapters of ranks that 16 does not divide are seen to spill here, 8 and 32 bytes.
_SPILLS_RAGGED: dict[int, tuple[Tile, ...]] = {90: (_LARGE[0], _HALF[90][0])}
# At 128 x 128 on sm_90 two blocks share a multiprocessor in three stages, in 128 registers; behind
# LayerScale and a residual, which take more, one block has it, and a fourth stage costs nothing.
_NOT_ON_90 = {True: SAFE, False: _DEEP}  # by whether there is more than a bias, without GELU


def candidates(
    arch: int,
    itemsize: int,
    heavy: bool = False,
    bulk: bool = False,
    activation: bool = False,
    ragged: bool = False,
) -> tuple[Tile, ...]:
    """The extended GEMM's tiles for sm_``arch``; the first of equal cost is chosen.

    Args:
        arch: 90 for compute capability 9.0.
        itemsize: bytes of an element of x.
        heavy: whether the epilogue does more than add a bias.
        bulk: whether descriptors can be made of x and w, which the persistent form needs.
        activation: whether the epilogue applies GELU or its derivative; heavy too, then.
        ragged: whether several adapters have ranks that 16 does not divide.
    """
    family = _family(arch)
    if itemsize == 2:
        tiles = (*(_BULK[family] if bulk else ()), *_HALF[family])
    else:
        tiles = (*_SINGLE[family], *(_SINGLE_BULK.get(family, ()) if bulk else ()))
    spills = _SPILLS.get(family, ()) if activation else ()
    spills += (_NOT_ON_90[heavy and not activation],) if family == 90 else ()
    spills += _SPILLS_RAGGED.get(family, ()) if ragged else ()
    fits = (t for t in tiles if t.fits(arch, itemsize, heavy or activation))
    return tuple(t for t in fits if t not in spills)


def gemm_tile(
    rows: int,
    columns: int,
    itemsize: int,
    heavy: bool,
    device: torch.device,
    bulk: bool = False,
    activation: bool = False,
    ragged: bool = False,
) -> Tile:
    """The candidate that keeps the busiest multiprocessor busy shortest."""
    tiles = candidates(architecture(device), itemsize, heavy, bulk, activation, ragged)
    return _least_cost(tiles, rows, columns, multiprocessors(device))


# A third operand in every step and a second accumulator: smaller than the extended GEMM's.
_ONE_PASS_SINGLE = (Tile(64, 32, 16, 4, 8), Tile(32, 32, 16, 4, 4))
# On sm_80 Triton 3.6 spills 8 bytes of TF32 with more stages.
_ONE_PASS_SINGLE_80 = (Tile(64, 32, 16, 2, 8), _ONE_PASS_SINGLE[1])
_ONE_PASS_HALF = (Tile(128, 64, 64, 3, 8), Tile(64, 64, 64, 3, 8))
_ONE_PASS: dict[int, tuple[Tile, ...]] = {
    80: _ONE_PASS_HALF,
    90: (SAFE, *_ONE_PASS_HALF),
    100: (SAFE, *_ONE_PASS_HALF),
    120: _ONE_PASS_HALF,
}
# As above, 8 to 152 bytes.
_ONE_PASS_SPILLS_RAGGED: dict[int, tuple[Tile, ...]] = {
    90: (SAFE, _ONE_PASS_SINGLE[0]),
    100: (SAFE,),
}


def one_pass_candidates(
    arch: int, itemsize: int, heavy: bool = False, ragged: bool = False
) -> tuple[Tile, ...]:
    """The one-pass GEMM's tiles for sm_``arch``, largest first; see ``candidates``."""
    single = _ONE_PASS_SINGLE_80 if _family(arch) == 80 else _ONE_PASS_SINGLE
    tiles = _ONE_PASS[_family(arch)] if itemsize == 2 else single
    spills = _ONE_PASS_SPILLS_RAGGED.get(_family(arch), ()) if ragged else ()
    return tuple(tile for tile in tiles if tile.fits(arch, itemsize, heavy) and tile not in spills)


def one_pass_tile(
    rows: int,
    columns: int,
    itemsize: int,
    device: torch.device,
    heavy: bool = False,
    ragged: bool = False,
) -> Tile:
    """As ``gemm_tile``."""
    tiles = one_pass_candidates(architecture(device), itemsize, heavy, ragged)
    return _least_cost(tiles, rows, columns, multiprocessors(device))


# Two thin accumulators beside the one; on sm_100 and sm_120 rows of 128 spill, 16 to 96 bytes, and
# with Triton 3.6 on sm_100 columns of 128 as well.
EXTENDED_GRADS = (SAFE, Tile(64, 128, 64, 3, 8), Tile(64, 64, 64, 3, 8))


MOST_GRAD_RANKS = 32  # sum R of either linear, whose sums stand beside the accumulator


def holds_gradients(columns: int, depth: int, ranks: int) -> bool:
    """Whether its tiles divide w [depth, columns], since masks would take the registers of the
    sums, and hold gradients of so many ranks; with no depth, those of the derivative alone."""
    whole = all(columns % t.block_n == depth % t.block_k == 0 < columns for t in EXTENDED_GRADS)
    return whole and ranks <= MOST_GRAD_RANKS


def extended_grads_candidates(arch: int) -> tuple[Tile, ...]:
    """Of dx whose tiles are operands of gradients, in 16 bits; see ``candidates``."""
    return EXTENDED_GRADS[:2] if _family(arch) < 100 else EXTENDED_GRADS[1:]


def extended_grads_tile(device: torch.device) -> Tile:
    """The largest, since one block has a multiprocessor however few rows there are."""
    return extended_grads_candidates(architecture(device))[0]


# Rows, columns and warps: 16 warps hide more, and spill 32 ranks from sm_100 on; where a chip has
# little shared memory Triton 3.6 asks for more, and 3.8 and 3.9 spill. dh as one product is a
# fifth fewer instructions and half the barriers of shares that are added, and is for sm_90 alone:
# where all products are of mma.sync they take its layout, and on sm_100 ragged ranks spill.
_GELU_GRADS = ((32, 256, 16), (32, 256, 8), (16, 256, 8), (16, 128, 8))


def gelu_grads_candidates(columns: int, arch: int) -> tuple[DerivativeTile, ...]:
    """Of GELU's derivative whose tiles are operands of gradients, in 16 bits: those that divide
    ``columns``, wide ones first, which leave fewer parts of dh'."""
    family = _family(arch)
    narrow = family >= 100 or shared_bytes(arch) <= LEAST_SHARED_KIB << 10
    return tuple(
        DerivativeTile(m, n, 1 if family == 90 else warps, 2, warps)
        for m, n, warps in _GELU_GRADS[narrow:]
        if columns % n == 0
    )


def gelu_grads_tile(columns: int, device: torch.device) -> DerivativeTile:
    """The first of them."""
    return gelu_grads_candidates(columns, architecture(device))[0]


# dy packed of its parts, db and dh: a block lies in one part and in the span of one adapter. In
# three stages Triton 3.9 spills 8 bytes of 32 ranks on sm_100, in two 16 bytes on sm_120; 128
# columns in four warps spill in one version or another.
PACK_GRADS = (
    *(ElementTile(32, 256, stages, 8) for stages in (3, 2)),
    ElementTile(64, 128, 2, 8),
    ElementTile(32, 64, 3, 4),
)


def packs_gradients(width: int, spans: Sequence[Span]) -> bool:
    """Whether its tiles divide parts of so many columns and every adapter's, which lie apart, and
    hold the ranks of each."""
    block = next((tile.block_n for tile in PACK_GRADS if width % tile.block_n == 0), 0)
    if not block or any(span.rank > MOST_GRAD_RANKS for span in spans):
        return False
    in_order = sorted(spans, key=lambda span: span.start)
    edges = [edge for span in in_order for edge in (span.start, span.stop)]
    return edges == sorted(edges) and all(edge % block == 0 for edge in edges)


def pack_grads_candidates(columns: int, arch: int) -> tuple[ElementTile, ...]:
    """In 16 bits: those that divide ``columns``, of a part or of dy in three; wide ones first."""
    tiles = PACK_GRADS[1:] if _family(arch) == 100 else (PACK_GRADS[0], *PACK_GRADS[2:])
    return tuple(tile for tile in tiles if columns % tile.block_n == 0)


def pack_grads_tile(columns: int, device: torch.device) -> ElementTile:
    """The first of them."""
    return pack_grads_candidates(columns, architecture(device))[0]


# Operands of one byte: 128 of them in a row of a step.
FP8 = (Tile(128, 128, 128, 3, 8), Tile(128, 64, 128, 3, 8), Tile(64, 64, 128, 3, 4))


def fp8_tile(rows: int, columns: int, device: torch.device) -> Tile:
    """As ``gemm_tile``, of the extended GEMM on FP8 codes; 128 x 256 spills, its sums being two."""
    return _least_cost(FP8, rows, columns, multiprocessors(device))


@lru_cache(maxsize=4096)
def _least_cost(tiles: tuple[Tile, ...], rows: int, columns: int, processors: int) -> Tile:
    return min(tiles, key=lambda tile: _busiest(tile, rows, columns, processors))


def _busiest(tile: Tile, rows: int, columns: int, processors: int) -> float:
    """Time of the busiest multiprocessor, in arbitrary units: its tiles x area and edges of one."""
    tiles = -(-rows // tile.block_m) * -(-columns // tile.width)
    area, edges = tile.block_m * tile.width, tile.block_m + tile.width
    return -(-tiles // processors) * (area + 32 * edges)


@lru_cache(maxsize=4096)
def thin_tile(
    rows: int, ranks: int, itemsize: int, device: torch.device, dropout: bool = False
) -> ThinTile:
    """Short in rows where there are few, so that every multiprocessor has some."""
    if itemsize == 4:
        capped = 0 if _family(architecture(device)) == 80 else 128
        return ThinTile(64, power_of_two(ranks, 16, 32), 16, 4, 4, capped)
    ranks = power_of_two(ranks, 16, 64)
    if dropout or rows < 128 * multiprocessors(device):
        return ThinTile(64, ranks, 64, 4, 8 if dropout or ranks == 64 else 4)
    roomy = shared_bytes(architecture(device)) > LEAST_SHARED_KIB << 10
    if not roomy:
        return ThinTile(128, ranks, 64, 3, 8)
    return ThinTile(128, ranks, 64, 4, 8 if ranks == 64 else 4)


def row_shrink_tile(ranks: int, norm: bool) -> ThinTile:
    """Of what makes x of 16 bits and h of it: as many stages as 99 KB hold of an fp32 z.

    On sm_120 ptxas spills 8 and 24 bytes of GELU where nothing caps registers, and 16 of 64 ranks
    of LayerNorm where 160 do.
    """
    ranks = power_of_two(ranks, 16, MOST_ROW_RANKS)
    wide = ranks == MOST_ROW_RANKS
    return ThinTile(64, ranks, 64, 3, 8, 128 if not wide else 0 if norm else 160)


def expand_tile(ranks: int) -> ThinTile:
    """Of what adds a low-rank term as it reads.

    LayerNorm's takes 168 to 217 registers on sm_90 in four warps, or with 128 columns a step.
    """
    return ThinTile(64, power_of_two(ranks, 16, MOST_ROW_RANKS), 64, 1, 8)


def grad_tile(ranks: int, itemsize: int, dropout: bool = False) -> GradTile:
    """One row block of ranks where they fit, wide in columns so that h is read seldom."""
    if itemsize == 4:
        return GradTile(power_of_two(ranks, 16, 32), 64, 32, 4, 4)
    return GradTile(power_of_two(ranks, 16, 64), 128, 64, 4, 8 if dropout else 4)


def power_of_two(size: int, least: int, most: int) -> int:
    """The first power of two that holds ``size``, within bounds."""
    return min(max(1 << (size - 1).bit_length(), least), most)
