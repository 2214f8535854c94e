"""The stacks of equal blocks in a model, and the tokens between the blocks, read by hooks.

A vision transformer has one stack, a ResNet one per stage. Of a model with an encoder and a
decoder, such as a U-Net, only the encoder has stacks: a decoder's blocks look alike in a list too,
but each takes another skip connection and none can be left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Stack:
    """A container whose children compute one after the other on tokens of one shape."""

    name: str  # dotted, of the container
    container: nn.Sequential | nn.ModuleList

    @property
    def blocks(self) -> list[nn.Module]:
        """First to last."""
        return list(self.container)


def stacks_of(model: nn.Module) -> list[Stack]:
    """Every stack, outermost alone; raises ValueError where the model has none."""
    trunk = trunk_of(model)
    found = list(_walk("" if trunk is model else "encoder", trunk))
    if not found:
        kinds = sorted({type(child).__name__ for child in trunk.children()})
        raise ValueError(
            f"{type(trunk).__name__} holds no stack of equal blocks: looked for an nn.Sequential "
            f"or nn.ModuleList with two children or more of one class, shape for shape alike after "
            f"the first; its children are {kinds or 'none'}"
        )
    return found


def trunk_of(model: nn.Module) -> nn.Module:
    """The encoder of a model that has a decoder beside it; otherwise the model."""
    encoder, decoder = (getattr(model, name, None) for name in ("encoder", "decoder"))
    both = isinstance(encoder, nn.Module) and isinstance(decoder, nn.Module)
    return encoder if both else model  # type: ignore[return-value]


def kept_of(depth: int, reduction: int) -> list[int]:
    """The blocks that stay: i % reduction == 0."""
    return list(range(0, depth, reduction))


def matched_of(depth: int, reduction: int) -> list[int]:
    """The teacher's block whose output each kept one stands for: the last before the next kept."""
    return [min(i + reduction, depth) - 1 for i in kept_of(depth, reduction)]


def tokens_in(output: object) -> Tensor:
    """The tokens in what a block returns: a tensor, or the first of a tuple."""
    found = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(found, Tensor):
        raise TypeError(f"a block returned {type(output).__name__}, not a tensor or a tuple of one")
    return found


def _walk(name: str, module: nn.Module) -> Iterator[Stack]:
    if isinstance(module, nn.Sequential | nn.ModuleList) and _equal(list(module)):
        yield Stack(name, module)
        return
    for leaf, child in module.named_children():
        yield from _walk(f"{name}.{leaf}" if name else leaf, child)


def _equal(blocks: list[nn.Module]) -> bool:
    """Whether all are of one class, and alike after the first, which may change the shape."""
    if len(blocks) < 2 or len({type(block) for block in blocks}) > 1 or not _nested(blocks[0]):
        return False
    shapes = [_shapes(block) for block in blocks[1:]]
    return bool(shapes[0]) and all(other == shapes[0] for other in shapes)


def _nested(block: nn.Module) -> bool:
    return any(True for _ in block.children())


def _shapes(block: nn.Module) -> Shapes:
    return {name: tuple(parameter.shape) for name, parameter in block.named_parameters()}


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
