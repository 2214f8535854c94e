"""What a vision transformer's blocks put out, by one forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from fused_lora.distill.blocks import blocks_of


class Tokens(NamedTuple):
    """The tokens that heads and comparisons read."""

    blocks: list[Tensor]  # [B, T, d] each, in the model's order
    prefix: int  # class and register tokens before the patches'
    size: tuple[int, int]  # of the image, in pixels

    @property
    def classes(self) -> list[Tensor]:
        """The class token of each block, [B, d]."""
        return [block[:, 0] for block in self.blocks]

    @property
    def patches(self) -> list[Tensor]:
        """The patch tokens of each block, [B, T - prefix, d]."""
        return [block[:, self.prefix :] for block in self.blocks]


def tokens_of(
    model: nn.Module, images: Tensor, last: int | None = None, *, norm: bool = True
) -> Tokens:
    """The outputs of the last blocks of one forward of ``model``.

    Args:
        model: a vision transformer; its class token comes first, and ``num_prefix_tokens`` (1
            where it has none) tokens come before the patches'.
        images: [B, channels, height, width].
        last: how many blocks; None for all.
        norm: pass each through the model's final ``norm``, where it has one.

    Raises:
        ValueError: ``last`` is not from 1 to the model's blocks, or a block's output is no
            [B, T, d].
    """
    blocks = [model.get_submodule(name) for name in _names(model)]
    count = len(blocks) if last is None else last
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= len(blocks):
        raise ValueError(f"last must be a whole number from 1 to {len(blocks)}, got {last!r}")
    with _outputs(blocks[-count:]) as found:
        getattr(model, "forward_features", model)(images)
    final = getattr(model, "norm", None) if norm else None
    outputs = [found[block] for block in blocks[-count:]]
    if isinstance(final, nn.Module):
        outputs = [final(output) for output in outputs]
    height, width = images.shape[-2:]
    return Tokens(outputs, int(getattr(model, "num_prefix_tokens", 1)), (height, width))


# Of a model with so many modules: to find its blocks takes longer than a small one's forward.
_known: WeakKeyDictionary[nn.Module, tuple[int, list[str]]] = WeakKeyDictionary()


def _names(model: nn.Module) -> list[str]:
    count = sum(1 for _ in model.modules())
    known = _known.get(model)
    if known is None or known[0] != count:
        known = _known[model] = count, [block.name for block in blocks_of(model)]
    return known[1]


@contextmanager
def _outputs(blocks: Sequence[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    found: dict[nn.Module, Tensor] = {}

    def note(block: nn.Module, _: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if not isinstance(first, Tensor) or first.dim() != 3:
            shape = tuple(first.shape) if isinstance(first, Tensor) else type(first).__name__
            raise ValueError(f"{type(block).__name__} puts out {shape}, not tokens [B, T, d]")
        found[block] = first

    hooks = [block.register_forward_hook(note) for block in blocks]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
