"""Which blocks are fused over, what they make again, and the way back."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from fused_lora.nn.adapted import AdaptedLinear
from fused_lora.nn.block import FusedLoRABlock, why_not_block, why_not_halves
from fused_lora.nn.block_mlp import FusedLoRAMlp, why_not_mlp
from fused_lora.nn.block_swap import Fused, kind
from fused_lora.nn.stand_in import device_hook, replaced_forward, why_not_called
from fused_lora.ops.operand import RECOMPUTE
from fused_lora.patching.budget import BlockNeed, choose_modes, fixed_bytes, need_of
from fused_lora.patching.errors import PatchError
from fused_lora.patching.report import BlockRow

LEVELS = ("linear", "block")
ELEMENTWISE = RECOMPUTE[1]


@dataclass(frozen=True)
class BlockChoice:
    """What the caller of ``patch`` asked for, of blocks; checked before anything is touched."""

    level: str  # one of LEVELS
    recompute: str | Mapping[str, str] | None  # None: the default, or what fits the budget
    memory_budget_gb: float | None

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise PatchError(f"level must be one of {LEVELS}, got {self.level!r}")
        budget, given = self.memory_budget_gb, self.recompute is not None
        if self.level == "linear" and (given or budget is not None):
            raise PatchError("recompute and memory_budget_gb speak of blocks: use level='block'")
        if given and budget is not None:
            raise PatchError("give recompute or memory_budget_gb, which chooses it; not both")
        if budget is not None and not 0 < budget < float("inf"):
            raise PatchError(f"memory_budget_gb must be a positive number, got {budget!r}")
        for key, mode in self.patterns.items():
            _check_pattern(key, mode)

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


def _check_pattern(key: str, mode: str) -> None:
    if mode not in RECOMPUTE:
        raise PatchError(f"recompute must be one of {RECOMPUTE}, got {mode!r}")
    try:
        re.compile(key)
    except re.error as error:
        raise PatchError(f"recompute: {key!r} is no regular expression: {error}") from None


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
    needs = [need_of(name, block, rows_of(name, seen) * batch_size) for name, block in fits]
    modes = _modes(model, needs, rows, choice)
    for need, (name, block) in zip(needs, fits, strict=True):
        mode, half = modes[name], "; ".join(why_not_halves(block))
        FusedLoRABlock.adopt(block, mode)
        rows.append(BlockRow(name, "block", mode, half, need.kept[mode]))
    for name, module in model.named_modules():
        if not isinstance(module, Fused) and not (why_not_mlp(module) or why_not_over(module)):
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
        if isinstance(module, Fused):
            module.release()
