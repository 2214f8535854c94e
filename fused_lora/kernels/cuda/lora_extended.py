"""EXTENDED by compiled kernels: operands laid out for the tensor maps, and the launch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_lora import disk, env
from fused_lora.kernels.cuda import native
from fused_lora.kernels.cuda.native import Chip
from fused_lora.kernels.interface import Adapters
from fused_lora.programs.record import begins_at, opaque

# Adapters as ``lora_extended`` reads them: 16-bit matrices in rows of whole 16 bytes.
#
#     h, dh  [M, sum P]   group g in P_g columns, its rank and up to 7 zeros
#     b      [N_g, R_g]   s b, rounded once to the compute dtype
#     a      [sum P, K]   rows of group g, then its zeros
#
# What lies so already is read where it is.


STEP = 8  # elements of 16 bytes


def padded(rank: int) -> int:
    """The next multiple of ``STEP``."""
    return -rank % STEP + rank


def aligned(matrix: Tensor) -> bool:
    """Whether its rows are contiguous and begin at multiples of 16 bytes."""
    whole_rows = matrix.stride(1) == 1 and matrix.stride(0) % STEP == 0
    return whole_rows and begins_at(matrix) % 16 == 0


def readable(matrix: Tensor) -> Tensor:
    """``matrix``, copied unless it is ``aligned``."""
    return matrix if aligned(matrix) else matrix.clone(memory_format=torch.contiguous_format)


def parts(ranks: Sequence[int]) -> Iterator[slice]:
    """The columns of each group in h, its zeros left out."""
    firsts = accumulate((padded(rank) for rank in ranks), initial=0)
    return (slice(first, first + rank) for first, rank in zip(firsts, ranks, strict=False))


def stacked_a(adapters: Adapters, dtype: torch.dtype) -> Tensor:
    """All a, [sum P, K] in ``dtype``."""
    ranks = [a_g.shape[0] for a_g in adapters.a]
    only = adapters.a[0]
    if len(ranks) == 1 and ranks[0] % STEP == 0 and only.dtype is dtype and aligned(only):
        return only
    stack = only.new_zeros(sum(map(padded, ranks)), only.shape[1], dtype=dtype)
    for part, a_g in zip(parts(ranks), adapters.a, strict=True):
        stack[part].copy_(a_g)
    return stack


def scaled_b(adapters: Adapters, dtype: torch.dtype) -> list[Tensor]:
    """s b of every group, [N_g, R_g] in ``dtype``, aligned."""
    return [
        b_g if s == 1.0 and b_g.dtype is dtype and aligned(b_g) else _scaled(b_g, s, dtype)
        for b_g, s in zip(adapters.b, adapters.scales, strict=True)
    ]


def _scaled(b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    n, rank = b.shape
    room = b.new_empty(n, padded(rank), dtype=dtype)[:, :rank]
    return torch.mul(b, scale, out=room)


def spread(h: Tensor, ranks: Sequence[int]) -> Tensor:
    """``h`` [M, sum R] as [M, sum P]; the zeros between groups are not written, nor read."""
    if aligned(h) and all(rank % STEP == 0 for rank in ranks[:-1]):
        return h
    wide = h.new_empty(h.shape[0], sum(map(padded, ranks)))
    for part, narrow in zip(parts(ranks), h.split(list(ranks), 1), strict=True):
        wide[:, part].copy_(narrow)
    return wide


def packed(h: Tensor, adapters: Adapters) -> Tensor:
    """``h`` [M, sum P] as [M, sum R], rows contiguous: without the zeros."""
    if h.shape[1] == adapters.rank:
        return h
    return torch.cat([h[:, part] for part in parts([span.rank for span in adapters.spans])], 1)


def shrink(x: Tensor, adapters: Adapters) -> Tensor:
    """h = x aT, [M, sum P], by the library."""
    return torch.mm(x, stacked_a(adapters, x.dtype).t())


def shrink_grad(dy: Tensor, adapters: Adapters) -> Tensor:
    """dh = s dy b, [M, sum P], by the library."""
    ranks = [span.rank for span in adapters.spans]
    dh = dy.new_empty(dy.shape[0], sum(map(padded, ranks)))
    groups = zip(parts(ranks), scaled_b(adapters, dy.dtype), adapters.spans, strict=True)
    for part, b_g, span in groups:
        dh[:, part] = torch.mm(dy[:, span.start : span.stop], b_g)
    return dh


# EXTENDED by hand on Hopper; see csrc/lora_linear_sm90/.
#
#     forward   y = residual + factor act(u), u = x wT + bias + s h bT    h = x aT
#     dx        dx = residual + dy w + dh a                               dh = s dy b
#               or du = act'(u) (dy w + dh a), where x = act(u)
#
#                   x [M, K]   w [N, K]   bias, factor [N]   u, y, residual [M, N]
#
# Base and low-rank products share one fp32 accumulator. s b is rounded once, as are y and, where an
# activation follows, u. Adapters own any columns; a tile sums over those that it meets.


class ProductTile(NamedTuple):
    """What a block has of y at once, and how many blocks are a cluster that reads w once."""

    rows: int
    columns: int
    cluster: int = 1  # their tiles one below the other; one where a tile has all rows
    ping_pong: bool = False  # a consumer has a tile of its own, and multiplies as the other writes

    @classmethod
    def of(cls, plan: Any) -> ProductTile:
        """That of a fused_lora._native.LinearPlan."""
        return cls(plan.tile_rows, plan.tile_columns, plan.cluster, plan.ping_pong)

    def __str__(self) -> str:
        blocks = "" if self.cluster == 1 else f", {self.cluster} blocks"
        return f"{self.rows} x {self.columns}{blocks}{', ping-pong' if self.ping_pong else ''}"


# Those of a cluster or in ping-pong serve where they are asked for by name, or were timed best.
WIDE = ((128, 128), (128, 192), (128, 256))
ALONE = tuple(ProductTile(*size) for size in (*WIDE, (64, 128), (64, 256)))
CLUSTERS = tuple(ProductTile(*size, cluster=2) for size in WIDE)
PING_PONG = tuple(ProductTile(64, 256, cluster, ping_pong=True) for cluster in (1, 2))
TILES: tuple[ProductTile, ...] = (*ALONE, *CLUSTERS, *PING_PONG)
DTYPES = (torch.bfloat16, torch.float16)


class CompiledOutput(NamedTuple):
    """What one forward hands back."""

    y: Tensor  # [M, N]
    h: Tensor  # [M, sum P], see lora_extended_operands
    u: Tensor | None  # [M, N], the pre-activation where there is an activation


def why_not(x: Tensor, w: Tensor, adapters: Adapters) -> str | None:
    """One sentence why x [M, K], or dy [M, N], and w cannot be served; None when they can."""
    if x.dtype not in DTYPES or w.dtype is not x.dtype:
        return f"x and w must be both bfloat16 or both float16, got {x.dtype} and {w.dtype}"
    if w.shape[0] % 8 or w.shape[1] % 8 or 0 in w.shape:
        return f"w {tuple(w.shape)} must have sizes that are multiples of 8"
    for name, matrix in (("x", x), ("w", w)):
        if not aligned(matrix):
            return f"{name} or its rows do not begin at multiples of 16 bytes"
    most = native.load().linear_most_groups
    if len(adapters.spans) > most:
        return f"{len(adapters.spans)} adapters share this layer; {most} are served"
    return None


def tile_of(
    rows: int,
    columns: int,
    depth: int,
    ranks: int,
    dtype: torch.dtype,
    device: torch.device,
    right: str = "rows",
) -> ProductTile:
    """The tile of one product: y [rows, columns] of x [rows, depth]; dx where w lies by columns.

    A measured winner of exactly these sizes, else that of fewest estimated cycles.
    """
    if found := winner(rows, columns, depth, dtype, device, right):
        return found
    return ProductTile.of(_plan(rows, columns, depth, ranks, Chip.of(device), right))


# Tiles that ``fused-lora tune`` measured fastest, beside those of Triton in the cache folder.
#
#     tiles.json   {identity of device and module: {"y bfloat16 25216x768x768": {tile}}}
#
# A row that is none of ``TILES`` is passed over, as is from then on a tile that failed its check.


FORMAT = "compiled tiles 1"
_passed_over: set[tuple[ProductTile, torch.dtype, torch.device]] = set()


def path() -> Path:
    """The file of winners."""
    return env.cache_dir() / "tiles.json"


def key(rows: int, columns: int, depth: int, dtype: torch.dtype, right: str = "rows") -> str:
    """What a winner is kept under."""
    of = "y" if right == "rows" else "dx"
    return f"{of} {str(dtype).removeprefix('torch.')} {rows}x{columns}x{depth}"


def winner(
    rows: int, columns: int, depth: int, dtype: torch.dtype, device: torch.device, right: str
) -> ProductTile | None:
    """The measured tile of exactly this product; None where none was, or where it is wrong."""
    found = _winners(device).get(key(rows, columns, depth, dtype, right))
    return None if (found, dtype, device) in _passed_over else found


def store(device: torch.device, found: Mapping[str, ProductTile]) -> None:
    """Keep ``found`` by key beside what the file has for ``device``; heard at the next start."""
    rows = {name: tile._asdict() for name, tile in found.items()}
    disk.merge_table(path(), _here(device), rows)


def pass_over(tile: ProductTile, dtype: torch.dtype, device: torch.device) -> bool:
    """Choose ``tile`` for no measurement's sake from now on; whether one had named it till now."""
    if (tile, dtype, device) in _passed_over or tile not in _winners(device).values():
        return False
    _passed_over.add((tile, dtype, device))
    return True


def forget() -> None:
    """As a new process would begin."""
    _winners.cache_clear()
    _passed_over.clear()


@lru_cache(maxsize=64)
def _winners(device: torch.device) -> dict[str, ProductTile]:
    rows = disk.table(path(), lambda: _here(device))
    found = {name: _tile(row) for name, row in rows.items()}
    return {name: tile for name, tile in found.items() if tile is not None}


def _here(device: torch.device) -> str:
    return f"{FORMAT}|{native.identity(device)}"


def _tile(row: object) -> ProductTile | None:
    return next((tile for tile in TILES if tile._asdict() == row), None)


def _plan(
    rows: int,
    columns: int,
    depth: int,
    ranks: int,
    chip: Chip,
    right: str,
    activation: str = "none",
    tile: ProductTile | None = None,
) -> Any:
    """fused_lora._native.LinearPlan; ValueError where ``tile`` is not one of ``TILES``."""
    module = native.load()
    plan = module.plan_lora_linear(
        **dict(rows=rows, columns=columns, depth=depth, ranks=ranks),
        right=getattr(module.Right, right),
        activation=getattr(module.Activation, activation),
        **dict(processors=chip.processors, tile=tile),
    )
    if plan is None:
        compiled = "; ".join(map(str, TILES))
        raise ValueError(f"the compiled product has no tile of {tile}; it has {compiled}")
    return plan


def forward(
    x: Tensor,  # [M, K]
    w: Tensor,  # [N, K]
    bias: Tensor | None,  # [N], contiguous
    adapters: Adapters,
    activation: str = "none",  # or gelu: erf, tanh
    h: Tensor | None = None,  # [M, sum R] where the shrink is done already
    tile: ProductTile | None = None,
    *,
    factor: Tensor | None = None,  # [N], contiguous: LayerScale
    residual: Tensor | None = None,  # [M, N]
    out: Tensor | None = None,  # [M, N]
    chip: Chip | None = None,
) -> CompiledOutput:
    """y = residual + factor act(x wT + bias + s h bT), and what a backward pass may keep."""
    assert (reason := why_not(x, w, adapters)) is None, reason
    ranks = [span.rank for span in adapters.spans]
    h = shrink(x, adapters) if h is None else spread(h, ranks)
    y = x.new_empty(x.shape[0], w.shape[0]) if out is None else out
    u = None if activation == "none" else torch.empty_like(y)
    groups = [
        (h[:, part], b_g, span.start)
        for part, b_g, span in zip(
            parts(ranks), scaled_b(adapters, x.dtype), adapters.spans, strict=True
        )
    ]
    epilogue = dict(bias=bias, factor=factor, residual=residual, u=u)
    _launch(x, w, groups, y, epilogue, "rows", activation, tile, chip)
    return CompiledOutput(y, h, u)


def input_grad(
    dy: Tensor,  # [M, N]
    w: Tensor,  # [N, K]
    adapters: Adapters,
    dh: Tensor | None = None,  # [M, sum R] where it is formed already
    tile: ProductTile | None = None,
    *,
    activation: str = "none",  # or gelu, of which x is a result: erf, tanh
    u: Tensor | None = None,  # [M, K], x = act(u)
    residual: Tensor | None = None,  # [M, K]: a gradient that joins
    out: Tensor | None = None,  # [M, K]
    chip: Chip | None = None,
) -> tuple[Tensor, Tensor]:
    """dx = residual + dy w + dh a [M, K], the sum times act'(u) behind an activation; and dh."""
    assert (reason := why_not(dy, w, adapters)) is None, reason
    ranks = [span.rank for span in adapters.spans]
    dh = shrink_grad(dy, adapters) if dh is None else spread(dh, ranks)
    dx = dy.new_empty(dy.shape[0], w.shape[1]) if out is None else out
    a = stacked_a(adapters, dy.dtype)
    groups = [(dh[:, part], a[part], 0) for part in parts(ranks)]
    epilogue = dict(bias=None, factor=None, residual=residual, u=u)
    _launch(dy, w, groups, dx, epilogue, "columns", activation, tile, chip)
    return dx, dh


def _launch(
    x: Tensor,
    w: Tensor,
    groups: Sequence[tuple[Tensor, Tensor, int]],  # h, border, first column of y
    y: Tensor,
    epilogue: dict[str, Tensor | None],
    right: str,  # rows where w and borders have a row for each column of y, else columns
    activation: str,
    tile: ProductTile | None,
    chip: Chip | None,
) -> None:
    across = 0 if right == "rows" else 1  # the dimension of w and borders that is y's columns
    assert y.shape == (x.shape[0], w.shape[across]) and x.shape[1] == w.shape[1 - across]
    assert all(t is None or t.dtype is x.dtype for t in (w, y, *epilogue.values())), x.dtype
    ranks = sum(h.shape[1] for h, _, _ in groups)
    chip = chip or Chip.of(x.device)
    tile = tile or winner(*y.shape, x.shape[1], x.dtype, x.device, right)
    plan = _plan(*y.shape, x.shape[1], ranks, chip, right, activation, tile)
    u, residual, bias, factor = (epilogue[name] for name in ("u", "residual", "bias", "factor"))
    assert all(vector is None or vector.is_contiguous() for vector in (bias, factor))
    launch = LinearLaunch(plan, (x, w, y, u, residual), groups, across)
    hs, borders, _ = zip(*groups, strict=True) if groups else ((), (), ())
    assert u is None or u.shape == y.shape, (u.shape, y.shape)
    written = [y, u] if right == "rows" and u is not None else [y]  # columns: u is read
    given = (x, w, y, u, residual, bias, factor, *hs, *borders)
    opaque(launch, lambda *_: None, *given, writes=written)


class LinearLaunch:
    """One launch but for its tensors, whose layouts are packed once: done now, and by programs."""

    __name__ = "lora_linear_sm90"
    by_address = True  # strides are bound

    def __init__(
        self,
        plan: Any,
        matrices: Sequence[Tensor | None],  # x, w, y, u and residual
        groups: Sequence[tuple[Tensor, Tensor, int]],
        across: int,
    ) -> None:
        module, x = native.load(), matrices[0]
        assert x is not None and (x.is_cuda or module.archs == "none"), matrices
        self.device = x.device
        names = ("x_row", "w_row", "y_row", "u_row", "residual_row")
        self._bound = module.BoundLinear(
            plan=plan,
            **dict(zip(names, map(_row, matrices), strict=True)),
            groups=[
                module.LinearGroup(
                    **dict(h_row=_row(h), border_row=_row(border), first_column=first),
                    **dict(columns=border.shape[across], rank=h.shape[1]),
                )
                for h, border, first in groups
            ],
            type=getattr(module.DType, str(x.dtype).removeprefix("torch.")),
        )

    def __call__(self, *tensors: Tensor | None) -> None:
        """On the current stream."""
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        self._bound(addresses, *native.queue(self.device))


def _row(matrix: Tensor | None) -> int:
    """Elements from one row to the next."""
    if matrix is None:
        return 0
    assert matrix.stride(1) == 1 or matrix.shape[1] <= 1, matrix.stride()
    return matrix.stride(0)
