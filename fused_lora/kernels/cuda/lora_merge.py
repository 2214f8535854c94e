"""w' = w + s b a of many weights in one compiled launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fused_lora.kernels.cuda import native
from fused_lora.kernels.interface import Adapters

# w' = w + s b a for many matrices in one launch, rounded once; see csrc/lora_merge/.
#
#     w, w' [N, K]   a [R, K]   b [N, R]
#
# The products of b and a, their sum and the addition are fp32. ``out`` may be ``w`` itself. The
# adapters of one fused matrix are merges of blocks of its rows; rank 0 copies a block.


_UINT64 = (1 << 64) - 1


@dataclass(frozen=True)
class CompiledMerge:
    """One adapter and the rows of one matrix it is merged into."""

    w: Tensor  # [N, K], rows contiguous
    out: Tensor  # [N, K], rows contiguous
    a: Tensor  # [R, K], any strides
    b: Tensor  # [N, R], any strides
    scale: float = 1.0
    offset: int = 0  # random index of element (0, 0); (n, k) has offset + n K + k

    def check(self, first: CompiledMerge) -> None:
        """Raise ValueError unless shapes fit, and dtypes and device are those of ``first``."""
        (n, k), r = self.w.shape, self.a.shape[0]
        shapes = [tuple(t.shape) for t in (self.w, self.out, self.a, self.b)]
        if shapes != [(n, k), (n, k), (r, k), (n, r)]:
            raise ValueError(f"lora_merge: w, out, a, b do not fit together: {shapes}")
        if k > 1 and (self.w.stride(1) != 1 or self.out.stride(1) != 1):
            raise ValueError("lora_merge: the last dimension of w and of out must be contiguous")
        for name in ("w", "out", "a", "b"):
            mine, other = getattr(self, name), getattr(first, name)
            if (mine.dtype, mine.device) != (other.dtype, first.w.device):
                raise ValueError(
                    f"lora_merge: {name} is {mine.dtype} on {mine.device}, "
                    f"the first is {other.dtype} and w on {first.w.device}"
                )


@dataclass(frozen=True)
class CompiledMergeTable:
    """A packed list of merges on a device; launch it as often as the tensors live."""

    merges: tuple[CompiledMerge, ...]  # keeps every tensor alive
    table: Tensor  # the items as bytes
    tiles: int
    types: object  # fused_lora._native.MergeTypes


def pack(merges: Sequence[CompiledMerge]) -> CompiledMergeTable:
    """Check ``merges`` and put their table on their device."""
    merges = tuple(merge for merge in merges if merge.w.numel())
    assert merges, "nothing to merge"
    module, first = native.load(), merges[0]
    for merge in merges:
        merge.check(first)
    if first.a.dtype != first.b.dtype:
        raise ValueError(f"lora_merge: a is {first.a.dtype}, b is {first.b.dtype}")
    types = module.MergeTypes(
        w=_dtype(module, first.w), out=_dtype(module, first.out), adapter=_dtype(module, first.a)
    )
    packed, tiles = module.pack_merge_items([_item(module, merge) for merge in merges], types)
    return CompiledMergeTable(merges, _on_device(packed, first.w.device), tiles, types)


@lru_cache(maxsize=64)
def _on_device(packed: bytes, device: torch.device) -> Tensor:
    """A table, copied once: its bytes name every pointer, stride and size it stands for."""
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8).to(device)


def launch(
    table: CompiledMergeTable, rounding: str = "nearest", seed: int = 0, step: int = 0
) -> None:
    """Run a packed table on the current stream of its device."""
    module, device = native.load(), table.table.device
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"lora_merge: rounding is 'nearest' or 'stochastic', got {rounding!r}")
    with torch.cuda.device(device):
        module.lora_merge(
            table=table.table.data_ptr(),
            count=len(table.merges),
            tiles=table.tiles,
            types=table.types,
            rounding=getattr(module.Rounding, rounding),
            seed=seed & _UINT64,
            step=step & _UINT64,
            **dict(zip(("device", "stream"), native.queue(device), strict=True)),
        )


def lora_merge(
    w: Sequence[Tensor],
    out: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    rounding: str = "nearest",
    seed: int = 0,
    step: int = 0,
    offsets: Sequence[int] | None = None,
) -> None:
    """Write ``out[i] = w[i] + scales[i] b[i] a[i]`` for all i in one launch."""
    offsets = [0] * len(w) if offsets is None else offsets
    merges = [CompiledMerge(*row) for row in zip(w, out, a, b, scales, offsets, strict=True)]
    if any(merge.w.numel() for merge in merges):
        launch(pack(merges), rounding, seed, step)


def _dtype(module: object, tensor: Tensor) -> object:
    """The module's name of a tensor's dtype."""
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"lora_merge: float32, bfloat16 and float16 are served, got {name}")
    return getattr(module.DType, name)  # type: ignore[attr-defined]


def _item(module: object, merge: CompiledMerge) -> object:
    """The module's form of one merge."""
    n, k = merge.w.shape
    return module.MergeItem(  # type: ignore[attr-defined]
        w=merge.w.data_ptr(),
        out=merge.out.data_ptr(),
        a=merge.a.data_ptr(),
        b=merge.b.data_ptr(),
        w_row=merge.w.stride(0),
        out_row=merge.out.stride(0),
        a_strides=merge.a.stride(),
        b_strides=merge.b.stride(),
        n=n,
        k=k,
        r=merge.a.shape[0],
        scale=merge.scale,
        offset=merge.offset,
    )


def merged(w: Tensor, adapters: Adapters, noise: tuple[int, int] | None = None) -> Tensor:
    """w' [N, K], a new tensor, rounded to nearest or stochastically by (seed, step)."""
    (out,) = merged_together([w], [adapters], noise)
    return out


def merged_together(
    weights: Sequence[Tensor],  # [N, K] each, one dtype
    adapters: Sequence[Adapters],  # of each, all of one dtype
    noise: tuple[int, int] | None = None,
) -> list[Tensor]:
    """Every w', likewise."""
    made = [w.clone(memory_format=torch.contiguous_format) for w in weights]
    pairs = [(out, span) for out, group in zip(made, adapters, strict=True) for span in group.spans]
    blocks = [out[span.start : span.stop] for out, span in pairs]
    offsets = [span.start * out.shape[1] for out, span in pairs]
    a, b, scales = ([t for group in adapters for t in group[i]] for i in range(3))
    rounding, words = ("nearest", (0, 0)) if noise is None else ("stochastic", noise)
    lora_merge(blocks, blocks, a, b, scales, rounding, *words, offsets)  # type: ignore[arg-type]
    return made
