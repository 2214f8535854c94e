"""The stacks of equal blocks in a model: a vision transformer has one, a ResNet one per stage.

Of a model with an encoder and a decoder, such as a U-Net, only the encoder has stacks: a decoder's
blocks look alike in a list too, but each takes another skip connection and none can be left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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
