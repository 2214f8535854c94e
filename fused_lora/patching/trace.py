"""One forward on the meta device: which weights the model uses, how, and on how many rows.

Some models read a projection's weight without calling its module; an adapter on that module's
output would do nothing, silently, so it goes into the weight instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fused_lora.patching.errors import PatchError
from fused_lora.patching.example import examples_for
from fused_lora.patching.rule import Found
from fused_lora.patching.trial import hooked, left_as_it_was, one_image_is_enough, without_hooks
from fused_lora.patching.watch import Sight, Watch


def observe(model: nn.Module, found: Sequence[Found], example: Any = None) -> dict[str, Sight]:
    """What one forward shows of each projection's weight, by its name.

    Args:
        model: left as it is: its parameters are stood in for by empty ones on the meta device.
        found: the projections to watch.
        example: a tensor, or a tuple of positional or dict of keyword arguments; None for one
            image. Its first dimension should be 1 for the rows to be those of one image. Where
            the forward asks for values, it is run once more with copies of them; where it fails
            without its hooks, with those too.

    Raises:
        PatchError: the forward fails, with its error.
    """
    examples = examples_for(model) if example is None else [example]
    said: dict[int, Exception] = {}  # by example, what its last try said
    roads = [True] if _any_on_meta(model) else [True, False]
    for hooks, on_meta in product((False, True) if hooked(model) else (False,), roads):
        for i, each in enumerate(examples if on_meta else examples[:1]):
            try:
                return _observed(model, found, each, on_meta, hooks)
            except PatchError:
                raise
            except Exception as error:
                said[i] = error
    raise PatchError(
        f"a trial forward failed ({type(said[0]).__name__}: {said[0]}); pass example_input= with "
        "one input the model accepts"
    ) from said[0]


def _observed(
    model: nn.Module, found: Sequence[Found], example: Any, on_meta: bool, hooks: bool
) -> dict[str, Sight]:
    standins = _standins(model, on_meta)
    names = {module: name and name + "." for name, module in model.named_modules()}
    weights = {f.name: id(standins[names[f.module] + f.tensor]) for f in found}
    sights = {weight: Sight() for weight in weights.values()}
    watch = Watch(sights, _to_label(found, weights))
    with ExitStack() as stack:
        stack.enter_context(left_as_it_was(model))
        one_image_is_enough(model)
        if not hooks:
            stack.enter_context(without_hooks(model))
        for each in found:
            if each.tensor == "weight":
                for hook in _hooks(each.module, *watch.inside(weights[each.name])):
                    stack.callback(hook.remove)
        stack.enter_context(torch.random.fork_rng(devices=[] if on_meta else None))
        stack.enter_context(torch.no_grad())
        stack.enter_context(watch)
        _call(model, standins, example, on_meta)
    return {name: sights[weight] for name, weight in weights.items()}


def _hooks(module: nn.Module, enter: Any, leave: Any) -> Iterable[Any]:
    return module.register_forward_pre_hook(enter), module.register_forward_hook(leave)


def _to_label(found: Iterable[Found], weights: dict[str, int]) -> Iterable[int]:
    """One of each kind of attention with several roles in one weight, by shape."""
    kinds: dict[tuple[str, torch.Size], int] = {}
    for each in found:
        if len(each.roles) > 1:
            kinds.setdefault(alike(each), weights[each.name])
    return kinds.values()


def alike(found: Found) -> tuple[str, torch.Size]:
    """What projections that are taken apart alike have in common."""
    return found.kind, found.module._parameters[found.tensor].shape  # type: ignore[union-attr]


def _standins(model: nn.Module, on_meta: bool) -> dict[str, Tensor]:
    """Parameters and buffers by name; empty ones on meta, or copies."""
    standins = {}
    for prefix, module in model.named_modules():  # each module once, however often it is used
        dot = prefix and prefix + "."
        for name, tensor in module._parameters.items():
            if tensor is not None:
                standins[dot + name] = _standin(tensor, on_meta)
        for name, tensor in module._buffers.items():
            if tensor is not None:
                standins[dot + name] = _standin(tensor, on_meta)
    return standins


def _standin(tensor: Tensor, on_meta: bool) -> Tensor:
    """Empty on meta; or a copy, so that nothing can write the model's own."""
    if on_meta:
        return torch.empty_like(tensor, device="meta")
    plain = type(tensor) in (Tensor, nn.Parameter)  # else quantised, which is no matrix to copy
    return tensor.detach().clone() if plain else tensor


def _call(model: nn.Module, standins: dict[str, Tensor], example: Any, on_meta: bool) -> None:
    device = torch.device("meta") if on_meta else next(model.parameters()).device
    example = tree_map_only(Tensor, lambda t: _moved(t, device), example)
    kwargs = example if isinstance(example, dict) else {}
    args = () if kwargs else example if isinstance(example, tuple) else (example,)
    torch.func.functional_call(model, standins, args, kwargs, tie_weights=False)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    empty = tensor.is_meta and device.type != "meta"  # an example of our own, which had no values
    return torch.zeros_like(tensor, device=device) if empty else tensor.to(device)


def _any_on_meta(model: nn.Module) -> bool:
    return any(p.is_meta for p in model.parameters())
