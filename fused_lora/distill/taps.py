"""The tokens between blocks, read by hooks: no model's forward is written anew."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fused_lora.distill.stack import kept_of, matched_of, stacks_of, tokens_in, trunk_of


@dataclass(frozen=True)
class Pair:
    """A block of the student, and the one of the teacher whose output it is to give."""

    teacher: str  # dotted names
    student: str


def pairs_of(teacher: nn.Module, reduction: int, blocks: str = "last") -> list[Pair]:
    """The pairs that the loss compares.

    Args:
        teacher: the model that the student was copied from.
        reduction: of the copy.
        blocks: "last", of the model; "stages", the last of each stack, which is what the decoder
            of a U-Net takes; "every", each block of the student.
    """
    stages = [
        [
            Pair(f"{stack.name}.{theirs}", f"{stack.name}.{mine}")
            for mine, theirs in enumerate(matched_of(len(stack.blocks), reduction))
        ]
        for stack in stacks_of(teacher)
    ]
    if blocks == "every":
        return [pair for stage in stages for pair in stage]
    lasts = [stage[-1] for stage in stages]
    return lasts if blocks == "stages" else lasts[-1:]


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
    model: nn.Module, images: Tensor, names: Sequence[str], *, whole: bool = True
) -> tuple[Tensor, list[Tensor]]:
    """The model's output on ``images``, and what its blocks ``names`` returned on the way.

    Without ``whole`` only the encoder runs, where a decoder follows it: the output is its own.
    """
    with tapped(model, names) as seen:
        output = (model if whole else trunk_of(model))(images)
    if missing := [name for name in names if name not in seen]:
        raise RuntimeError(f"{type(model).__name__} never called its blocks {missing}")
    return output, [seen[name] for name in names]
