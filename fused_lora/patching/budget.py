"""What a block keeps for backward, counted from shapes; and which blocks make what again to fit.

Counts are those of a forward in the weights' own dtype; under autocast a block keeps less.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn

from fused_lora.nn import AdaptedLinear
from fused_lora.nn.block import why_not_attention_half, why_not_lean, why_not_mlp_half
from fused_lora.nn.block_mlp import linears
from fused_lora.nn.block_parts import ATTENTIONS, MLPS
from fused_lora.nn.block_swap import kind
from fused_lora.ops.operand import RECOMPUTE
from fused_lora.patching.errors import PatchError
from fused_lora.patching.explain import plan_of
from fused_lora.types import Keep

MOMENTS = 2  # of Adam, beside the gradient, for everything that trains
STATISTIC = 4  # bytes of a mean, a reciprocal deviation or a log-sum-exp; 8 in float64


@dataclass(frozen=True)
class BlockNeed:
    """Bytes that one block keeps for backward, by what it makes again."""

    name: str
    kept: dict[str, int]  # by recompute mode


def need_of(name: str, block: Any, rows: int) -> BlockNeed:
    """Count ``block`` on ``rows`` rows of x; a half of unknown modules counts as nothing."""
    kept = dict.fromkeys(RECOMPUTE, 0)
    halves = [_attention] * (kind(block.attn) in ATTENTIONS) + [_mlp] * (kind(block.mlp) in MLPS)
    for half in halves:
        for mode in RECOMPUTE:
            kept[mode] += half(block, mode, rows)
    return BlockNeed(name, kept)


def _attention(block: Any, mode: str, rows: int) -> int:
    attn = block.attn
    mode = "none" if why_not_attention_half(block) else mode
    width, inner = attn.qkv.in_features, attn.proj.in_features
    item, stat = _sizes(attn.proj.weight.dtype.itemsize)
    normed = _keeps_output(attn.q_norm) + _keeps_output(attn.k_norm)
    lean = mode == "gemm" and not why_not_lean(attn)
    columns = width + inner + (0 if lean else (3 + normed) * inner)
    columns += width if mode == "none" else 0
    statistics = attn.num_heads * (1 + 2 * normed) + (2 if mode == "none" else 0)
    low = 0 if mode == "gemm" else _low(attn.qkv, rows) + _low(attn.proj, rows)
    return rows * (columns * item + statistics * stat) + low


def _mlp(block: Any, mode: str, rows: int) -> int:
    mode = "none" if why_not_mlp_half(block) else mode
    *firsts, fc2 = linears(block.mlp)
    item, stat = _sizes(fc2.weight.dtype.itemsize)
    u = sum(first.out_features for first in firsts)
    columns, statistics = firsts[0].in_features, 0
    columns += u if mode != "gemm" else 0
    if mode == "none":
        columns, statistics = columns + firsts[0].in_features + fc2.in_features, 2
    low = 0 if mode == "gemm" else sum(_low(linear, rows) for linear in (*firsts, fc2))
    return rows * (columns * item + statistics * stat) + low


def _sizes(item: int) -> tuple[int, int]:
    return item, max(item, STATISTIC)


def _keeps_output(module: Any) -> bool:
    """Whether a q_norm or k_norm does something, and so keeps its output."""
    return not isinstance(module, nn.Identity)


def _low(linear: Any, rows: int) -> int:
    """Bytes of h or w', as the plan keeps it."""
    if not isinstance(linear, AdaptedLinear):
        return 0
    keep, item = plan_of(linear, rows).keep, linear.weight.dtype.itemsize
    if keep is Keep.MERGED:
        return linear.weight.numel() * item
    rank = sum(span.rank for span in linear.groups.values())
    return rows * rank * item if keep is Keep.HIDDEN else 0


def fixed_bytes(model: nn.Module) -> int:
    """Weights and buffers, and for what trains a gradient and Adam's moments."""
    tensors = [*model.parameters(), *model.buffers()]
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return sum(t.nbytes for t in tensors) + (1 + MOMENTS) * trained


def choose_modes(needs: list[BlockNeed], fixed: int, budget: int) -> dict[str, str]:
    """A mode for each block such that everything fits in ``budget`` bytes.

    All blocks keep everything if that fits; else norms and activations are made again in as many
    blocks as it takes, first block first, and then GEMMs likewise.

    Raises:
        PatchError: it does not fit even with every GEMM made again.
    """
    modes = dict.fromkeys([need.name for need in needs], RECOMPUTE[0])
    total = fixed + sum(need.kept[RECOMPUTE[0]] for need in needs)
    for before, after in pairwise(RECOMPUTE):
        for need in needs:
            if total <= budget:
                return modes
            total += need.kept[after] - need.kept[before]
            modes[need.name] = after
    if total > budget:
        raise PatchError(
            f"memory_budget_gb={budget / 1e9:g} is not enough: weights, gradients and Adam's "
            f"moments take {fixed / 1e9:.2f} GB and the blocks keep {(total - fixed) / 1e9:.2f} GB "
            "more with recompute='gemm' everywhere; lower batch_size or raise the budget"
        )
    return modes
