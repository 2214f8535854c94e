"""The tokens between blocks, read by hooks: no model's forward is written anew."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fused_lora.distill.stack import kept_of, matched_of, stacks_of, tokens_in


@dataclass(frozen=True)
class Pair:
    """A block of the student, and the one of the teacher whose output it is to give."""

    teacher: str  # dotted names
    student: str


def pairs_of(teacher: nn.Module, reduction: int, every: bool = False) -> list[Pair]:
    """The pairs that the loss compares: the last blocks, or every block of the student."""
    pairs = [
        Pair(f"{stack.name}.{theirs}", f"{stack.name}.{mine}")
        for stack in stacks_of(teacher)
        for mine, theirs in enumerate(matched_of(len(stack.blocks), reduction))
    ]
    return pairs if every else pairs[-1:]


def spans_of(teacher: nn.Module, reduction: int) -> dict[str, list[str]]:
    """For each block of the student, those of the teacher it stands for: kept, then skipped."""
    return {
        f"{stack.name}.{mine}": [f"{stack.name}.{i}" for i in range(first, last + 1)]
        for stack in stacks_of(teacher)
        for mine, (first, last) in enumerate(
            zip(
                kept_of(len(stack.blocks), reduction),
                matched_of(len(stack.blocks), reduction),
                strict=True,
            )
        )
    }


@contextmanager
def tapped(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Within the block, each forward leaves the outputs of the named modules in the dict."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            seen[name] = tokens_in(output)

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield seen
    finally:
        for each in hooks:
            each.remove()


def tokens_of(
    model: nn.Module, images: Tensor, names: Sequence[str]
) -> tuple[Tensor, list[Tensor]]:
    """The model's output on ``images``, and what its blocks ``names`` returned on the way."""
    with tapped(model, names) as seen:
        output = model(images)
    if missing := [name for name in names if name not in seen]:
        raise RuntimeError(f"{type(model).__name__} never called its blocks {missing}")
    return output, [seen[name] for name in names]
