"""One forward on the meta device: which linears the model calls, and with how many rows.

Some models read a projection's weight without calling its module; a patched module there would do
nothing, silently.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fused_lora.patching.errors import PatchError


def example_for(model: nn.Module) -> Tensor:
    """One image on the meta device, in the size the model says it expects, else 224 x 224."""
    size: Any = None
    for holder in ("pretrained_cfg", "default_cfg"):
        configuration = getattr(model, holder, None)
        if isinstance(configuration, dict) and (size := configuration.get("input_size")):
            break
    embed = getattr(model, "patch_embed", None)
    image = getattr(embed, "img_size", None)
    if isinstance(image, (tuple, list)) and len(image) == 2:
        size = (size[0] if size else 3, *image)
    channels = getattr(getattr(embed, "proj", None), "in_channels", None)
    if isinstance(channels, int):
        size = (channels, *(size[1:] if size else (224, 224)))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return torch.empty(1, *(size or (3, 224, 224)), device="meta", dtype=dtype)


def rows_per_call(
    model: nn.Module, modules: Iterable[tuple[str, nn.Module]], example: Any = None
) -> dict[str, int]:
    """Rows of x that each named module saw in one forward; absent where it was never called.

    Args:
        model: left as it is: its parameters are stood in for by empty ones on the meta device.
        modules: (name, module) pairs to watch.
        example: a tensor, or a tuple of positional or dict of keyword arguments; None for one
            image. Its first dimension should be 1 for the rows to be those of one image.

    Raises:
        PatchError: the forward fails, with its error.
    """
    rows: dict[str, int] = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = inputs[0] if inputs else next(iter(kwargs.values()))
            rows[name] = max(rows.get(name, 0), math.prod(x.shape[:-1]))

        return hook

    hooks = [m.register_forward_pre_hook(note(name), with_kwargs=True) for name, m in modules]
    try:
        _forward_on_meta(model, example_for(model) if example is None else example)
    except Exception as error:
        raise PatchError(
            f"a trial forward on the meta device failed ({type(error).__name__}: {error}); pass "
            "example_input= with one input the model accepts"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return rows


def _forward_on_meta(model: nn.Module, example: Any) -> None:
    standins = {
        f"{prefix}.{name}" if prefix else name: torch.empty_like(tensor, device="meta")
        for prefix, module in model.named_modules()  # each module once, however often it is used
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    }
    example = tree_map_only(Tensor, lambda t: t.to("meta"), example)
    kwargs = example if isinstance(example, dict) else {}
    args = () if kwargs else example if isinstance(example, tuple) else (example,)
    with torch.no_grad(), _attributes_kept(model):
        torch.func.functional_call(model, standins, args, kwargs, tie_weights=False)


@contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards every module has the attributes and buffers of before: no cache made on meta."""
    before = [(m, dict(m.__dict__), dict(m._buffers)) for m in model.modules()]
    try:
        yield
    finally:
        for module, attributes, buffers in before:
            for now, then in ((module.__dict__, attributes), (module._buffers, buffers)):
                now.clear()
                now.update(then)
