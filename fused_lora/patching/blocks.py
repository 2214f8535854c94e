"""Which blocks run as one call, and what they recompute within a budget of memory."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn

from fused_lora.arguments import by_string, number, one_of
from fused_lora.nn import AdaptedLinear
from fused_lora.nn.block import (
    FusedLoRABlock,
    FusedLoRAMlp,
    linears,
    why_not_attention_half,
    why_not_block,
    why_not_halves,
    why_not_mlp,
    why_not_mlp_half,
    why_qkv_is_kept,
)
from fused_lora.nn.block_modules import ATTENTIONS, MLPS, FusedModule, kind
from fused_lora.nn.stand_in import device_hook, replaced_forward, why_not_called
from fused_lora.ops.operand import RECOMPUTE
from fused_lora.patching.explain import PlanOf, plan_of, plans_once
from fused_lora.patching.options import compiled
from fused_lora.patching.report import BlockRow, PatchError
from fused_lora.types import Keep

# What a block keeps for backward, counted from shapes; and which blocks recompute what to fit.
#
# Counts are those of a forward in the weights' own dtype; under autocast a block keeps less.


MOMENTS = 2  # of Adam, beside the gradient, for everything that trains
STATISTIC = 4  # bytes of a mean, a reciprocal deviation or a log-sum-exp; 8 in float64


@dataclass(frozen=True)
class BlockNeed:
    """Bytes that one block keeps for backward, by what it recomputes."""

    name: str
    kept: dict[str, int]  # by recompute mode


def need_of(name: str, block: Any, rows: int, plan: PlanOf = plan_of) -> BlockNeed:
    """Count ``block`` on ``rows`` rows of x; a half of unknown modules counts as nothing."""
    kept = dict.fromkeys(RECOMPUTE, 0)
    halves = [_attention] * (kind(block.attn) in ATTENTIONS) + [_mlp] * (kind(block.mlp) in MLPS)
    for half in halves:
        for mode in RECOMPUTE:
            kept[mode] += half(block, mode, rows, plan)
    return BlockNeed(name, kept)


def _attention(block: Any, mode: str, rows: int, plan: PlanOf) -> int:
    attn = block.attn
    mode = "none" if why_not_attention_half(block) else mode
    width, inner = attn.qkv.in_features, attn.proj.in_features
    item, stat = _sizes(attn.proj.weight.dtype.itemsize)
    normed = _keeps_output(attn.q_norm) + _keeps_output(attn.k_norm)
    lean = mode == "gemm" and not why_qkv_is_kept(attn)
    columns = width + inner + (0 if lean else (3 + normed) * inner)
    columns += width if mode == "none" else 0
    statistics = attn.num_heads * (1 + 2 * normed) + (2 if mode == "none" else 0)
    low = 0 if mode == "gemm" else sum(_low(one, rows, plan) for one in (attn.qkv, attn.proj))
    return rows * (columns * item + statistics * stat) + low


def _mlp(block: Any, mode: str, rows: int, plan: PlanOf) -> int:
    mode = "none" if why_not_mlp_half(block) else mode
    *firsts, fc2 = linears(block.mlp)
    item, stat = _sizes(fc2.weight.dtype.itemsize)
    u = sum(first.out_features for first in firsts)
    columns, statistics = firsts[0].in_features, 0
    columns += u if mode != "gemm" else 0
    if mode == "none":
        columns, statistics = columns + firsts[0].in_features + fc2.in_features, 2
    low = 0 if mode == "gemm" else sum(_low(one, rows, plan) for one in (*firsts, fc2))
    return rows * (columns * item + statistics * stat) + low


def _sizes(item: int) -> tuple[int, int]:
    return item, max(item, STATISTIC)


def _keeps_output(module: Any) -> bool:
    """Whether a q_norm or k_norm does something, and so keeps its output."""
    return not isinstance(module, nn.Identity)


def _low(linear: Any, rows: int, plan: PlanOf) -> int:
    """Bytes of h or w', as the plan keeps it."""
    if not isinstance(linear, AdaptedLinear):
        return 0
    keep, item = plan(linear, rows).keep, linear.weight.dtype.itemsize
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

    All blocks keep everything if that fits; else norms and activations are recomputed in as many
    blocks as it takes, first block first, and then GEMMs likewise.

    Raises:
        PatchError: it does not fit even with every GEMM recomputed.
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


LEVELS = ("linear", "block")
ELEMENTWISE = RECOMPUTE[1]


@dataclass(frozen=True)
class BlockChoice:
    """What the caller of ``patch`` asked for, of blocks; checked before anything is touched."""

    level: str  # one of LEVELS
    recompute: str | Mapping[str, str] | None  # None: the default, or what fits the budget
    memory_budget_gb: float | None

    def __post_init__(self) -> None:
        one_of("level", self.level, LEVELS, PatchError)
        budget, given = self.memory_budget_gb, self.recompute is not None
        if self.level == "linear" and (given or budget is not None):
            raise PatchError("recompute and memory_budget_gb are for blocks: use level='block'")
        if given and budget is not None:
            raise PatchError("give recompute or memory_budget_gb, which chooses it; not both")
        if budget is not None and number("memory_budget_gb", budget, PatchError) <= 0:
            raise PatchError(f"memory_budget_gb must be a positive number, got {budget}")
        for key, mode in by_string("recompute", self.patterns, PatchError).items():
            one_of("recompute", mode, RECOMPUTE, PatchError)
            compiled("recompute", key)

    @property
    def patterns(self) -> Mapping[str, str]:
        """Regular expression on a block's name to mode; one mode alone matches every name."""
        if isinstance(self.recompute, Mapping):
            return self.recompute
        return {"": ELEMENTWISE if self.recompute is None else self.recompute}

    def mode_of(self, name: str) -> str:
        """The mode of the first pattern that matches."""
        found = (mode for key, mode in self.patterns.items() if re.search(key, name))
        return next(found, ELEMENTWISE)


def candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that hold an attention and an MLP, as a block does."""
    for name, module in model.named_modules():
        if {"attn", "mlp"} <= module._modules.keys() or {"attns", "ffns"} <= module._modules.keys():
            yield name, module


def fuse(
    model: nn.Module, choice: BlockChoice, seen: Mapping[str, int], batch_size: int
) -> list[BlockRow]:
    """Fuse what can be; a row for each block, and for each MLP in a block that could not be.

    ``seen`` holds the rows of x that one image gives each linear.
    """
    if choice.level == "linear":
        return []
    held = list(candidates(model))
    why = {name: _why_left(block) for name, block in held}
    fits = [(name, block) for name, block in held if why[name] is None]
    rows = [BlockRow(name, "linear", reason=reason) for name, reason in why.items() if reason]
    plan = plans_once()
    needs = [need_of(name, block, rows_of(name, seen) * batch_size, plan) for name, block in fits]
    modes = _modes(model, needs, rows, choice)
    for need, (name, block) in zip(needs, fits, strict=True):
        mode, half = modes[name], "; ".join(why_not_halves(block))
        FusedLoRABlock.adopt(block, mode)
        rows.append(BlockRow(name, "block", mode, half, need.kept[mode]))
    for name, module in model.named_modules():
        if not isinstance(module, FusedModule) and not (
            why_not_mlp(module) or why_not_over(module)
        ):
            mode = modes.get(name.rpartition(".")[0]) or choice.mode_of(name)
            FusedLoRAMlp.adopt(module, mode)
            if not any(name.startswith(block + ".") for block, _ in fits):
                rows.append(BlockRow(name, "mlp", mode))
    return rows


def _why_left(block: nn.Module) -> str | None:
    known = kind(block) in FusedLoRABlock.known
    return (why_not_over(block) if known else None) or why_not_block(block)


def why_not_over(module: nn.Module) -> str | None:
    """Why the forward of ``module``, or of a class inside it, is not what was read here.

    A forward bound to a module inside is asked for at every call, as hooks are.
    """
    if why := why_not_called(module) or device_hook(module):
        return why
    inner = ((n, m) for n, m in module.named_modules() if not isinstance(m, AdaptedLinear))
    return next((f"{name}: {why}" for name, m in inner if (why := replaced_forward(type(m)))), None)


def _modes(
    model: nn.Module, needs: list[BlockNeed], unfused: list[BlockRow], choice: BlockChoice
) -> dict[str, str]:
    names = [name for name, _ in model.named_modules()]
    for key in choice.patterns:
        if not any(re.search(key, name) for name in names):
            raise PatchError(f"recompute: {key!r} matches no module's name")
    if choice.memory_budget_gb is None:
        return {need.name: choice.mode_of(need.name) for need in needs}
    if unfused or not needs:
        told = f"{unfused[0].name}: {unfused[0].reason}" if unfused else "no block found"
        raise PatchError(f"memory_budget_gb counts what fused blocks keep, and one is not: {told}")
    return choose_modes(needs, fixed_bytes(model), int(choice.memory_budget_gb * 1e9))


def rows_of(block: str, seen: Mapping[str, int]) -> int:
    """Rows of x that one image gives a block: those of its qkv, which another may share."""
    return seen.get(f"{block}.attn.qkv" if block else "attn.qkv", max(seen.values()))


def unfuse(model: nn.Module) -> None:
    """Give every fused module its class back."""
    for module in model.modules():
        if isinstance(module, FusedModule):
            module.release()
