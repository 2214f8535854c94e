"""One forward on an example, observed: which linears are called, on what; nothing of it left."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from fused_lora.nn.stand_in import GLOBAL_HOOKS, HOOKS, of_torch, version_of
from fused_lora.patching.example import examples_for
from fused_lora.patching.report import PatchError
from fused_lora.patching.rules import FoundProjection

# What a trial forward may not leave behind: the model before and after it, compared and restored.
#
# Nothing of the user's runs in a trial: hooks, global ones too, are taken off, and accelerate's
# forwards give way to those of the classes. torch's own hooks that make a weight stay.


TABLES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", *HOOKS)


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Afterwards every module has the class, attributes, tensors and hooks of before.

    Raises:
        PatchError: a parameter or buffer of the model's own was written.
    """
    modules = [(name, _State(module)) for name, module in model.named_modules()]
    try:
        yield
    finally:
        for _, state in modules:
            state.restore()
    for name, state in modules:
        if written := state.written():
            raise PatchError(
                f"the trial forward wrote {name and name + '.'}{written} in place: the model "
                "changes its own weights in a forward, past the stand-ins it was given"
            )


class _State:
    """One module: its class, attributes and tables, and how often its tensors were written."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.kind = type(module)
        self.attributes = dict(module.__dict__)
        tables = ((name, module.__dict__.get(name)) for name in TABLES)
        self.tables = {name: table.copy() for name, table in tables if table is not None}
        self.versions = {name: version_of(tensor) for name, tensor in self._tensors()}

    def _tensors(self) -> list[tuple[str, Tensor]]:
        both = self.tables["_parameters"] | self.tables["_buffers"]
        return [(name, tensor) for name, tensor in both.items() if tensor is not None]

    def restore(self) -> None:
        if type(self.module) is not self.kind:
            self.module.__class__ = self.kind
        own = self.module.__dict__
        own.clear()
        own.update(self.attributes)
        for name, table in self.tables.items():
            own[name].clear()
            own[name].update(table)

    def written(self) -> str:
        """The first tensor that was written; empty where none was."""
        changed = (n for n, tensor in self._tensors() if version_of(tensor) != self.versions[n])
        return next(changed, "")


@contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Within, no hook of the user's is called; the modules themselves are put right by others."""
    before = [table.copy() for table in GLOBAL_HOOKS]
    for table in GLOBAL_HOOKS:
        table.clear()
    for module in model.modules():
        for name in HOOKS:
            table = module.__dict__[name]
            for key in [key for key, hook in table.items() if not of_torch(hook)]:
                del table[key]
        if "_hf_hook" in module.__dict__:
            module.__dict__.pop("forward", None)
    try:
        yield
    finally:
        for table, then in zip(GLOBAL_HOOKS, before, strict=True):
            table.update(then)


def hooked(model: nn.Module) -> bool:
    """Whether the user, or the model itself, hooked any module."""
    tables: Iterator[Any] = (m.__dict__[name] for m in model.modules() for name in HOOKS)
    return any(not of_torch(hook) for table in tables for hook in table.values())


def one_image_is_enough(model: nn.Module) -> None:
    """Batch norms evaluate, which a single vector would not let train; put right by others."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.training = False


# What a forward does with the weights under watch: who reads them, how y is taken apart.
#
# Labels travel beside y: the number of its column at every element, through each view the attention
# makes of it, until fewer columns than all are together. That is how the model itself says which
# columns are q, k and v, and whether heads come first.


VIEWS = frozenset({
    "reshape", "view", "permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis",
    "unbind", "chunk", "split", "tensor_split", "split_with_sizes", "unsafe_chunk",
    "unsafe_split", "unflatten", "flatten", "__getitem__", "select", "narrow", "squeeze",
    "unsqueeze", "contiguous", "clone",
})  # fmt: skip
Columns = tuple[tuple[int, int], ...]  # ranges [start, stop) of y


@dataclass
class ObservedWeight:
    """What one forward showed of one weight."""

    rows: int = 0  # of x, in the largest use
    called: bool = False  # by its module's own forward
    read: bool = False  # by anybody else
    given: Any = None  # what its module was called with, the tensor itself
    width: int = 0  # columns of y, once labelled
    parts: list[Tensor] = field(default_factory=list)  # columns found together, as y came apart

    @property
    def columns(self) -> Columns:
        """The ranges that y was taken apart into; empty where they are no ranges."""
        ranges = {(int(p[0]), int(p[-1]) + 1) for p in self.parts if p[-1] - p[0] + 1 == len(p)}
        return tuple(sorted(ranges)) if len(ranges) == len(self.parts) else ()


class Observer(TorchFunctionMode):
    """Notes every use of some weights while it is in force."""

    def __init__(self, observations: Mapping[int, ObservedWeight], labelled: Iterable[int]) -> None:
        """``observations`` by the id of a weight's tensor; ``labelled`` are those to label."""
        super().__init__()
        self._observations = observations
        self._labelled = set(labelled)
        self._inside: set[int] = set()  # weights whose own module is running
        # the tensor kept, its labels, of whom
        self._labels: dict[int, tuple[Tensor, Tensor, ObservedWeight]] = {}

    def inside(self, weight: int) -> tuple[Callable[..., None], Callable[..., None]]:
        """Hooks that tell when the module of ``weight`` runs."""

        def enter(_: nn.Module, args: tuple[Any, ...]) -> None:
            self._inside.add(weight)
            self._observations[weight].called = True
            self._observations[weight].given = args[0] if args else None

        return enter, lambda *_: self._inside.discard(weight)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run ``func``, and note what it says of the weights."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):  # else it asks a shape
            for tensor in tensors:
                if id(tensor) in self._observations:
                    self._note(id(tensor), tensors[0], result)
            self._follow(func, args, kwargs, tensors, result)
        return result

    def _note(self, weight: int, x: Tensor, result: Any) -> None:
        observed = self._observations[weight]
        observed.read |= weight not in self._inside
        if id(x) not in self._observations:
            observed.rows = max(observed.rows, math.prod(x.shape[:-1]))
        first = weight in self._labelled and not observed.width
        if first and isinstance(result, Tensor) and id(x) not in self._observations:
            observed.width = result.shape[-1]
            labels = torch.arange(observed.width, dtype=torch.int32, device="cpu")
            self._labels[id(result)] = (result, labels.expand(result.shape), observed)

    def _follow(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[Tensor],
        result: Any,
    ) -> None:
        sources = [t for t in tensors if id(t) in self._labels]
        if not sources or id(result) in self._labels:
            return
        (source, labels, observed) = self._labels[id(sources[0])]
        if getattr(func, "__name__", "") in VIEWS:
            args, kwargs = tree_map(lambda e: labels if e is source else e, (args, kwargs))
            moved = func(*args, **kwargs)
            for out, each in zip(tree_leaves(result), tree_leaves(moved), strict=True):
                self._settle(out, each, observed)
        elif isinstance(result, Tensor) and result.shape == source.shape:
            self._labels[id(result)] = (result, labels, observed)  # a bias, a norm, a cast

    def _settle(self, out: Tensor, labels: Tensor, observed: ObservedWeight) -> None:
        present = torch.zeros(observed.width, dtype=torch.bool, device="cpu")
        present[labels.reshape(-1).long()] = True
        columns = present.nonzero().view(-1)
        if len(columns) == observed.width:
            self._labels[id(out)] = (out, labels, observed)
        elif len(columns):
            observed.parts.append(columns)


# One forward on the meta device: which weights the model uses, how, and on how many rows.
#
# Some models read a projection's weight without calling its module; an adapter on that module's
# output would do nothing, silently, so it goes into the weight instead.


def observe(
    model: nn.Module, found: Sequence[FoundProjection], example: Any = None
) -> dict[str, ObservedWeight]:
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
    errors: dict[int, Exception] = {}  # by example, of its last try
    devices = [True] if _any_on_meta(model) else [True, False]
    for hooks, on_meta in product((False, True) if hooked(model) else (False,), devices):
        for i, each in enumerate(examples if on_meta else examples[:1]):
            try:
                return _observed(model, found, each, on_meta, hooks)
            except PatchError:
                raise
            except Exception as error:
                errors[i] = error
    raise PatchError(
        f"a trial forward failed ({type(errors[0]).__name__}: {errors[0]}); pass example_input= "
        "with one input the model accepts"
    ) from errors[0]


def _observed(
    model: nn.Module, found: Sequence[FoundProjection], example: Any, on_meta: bool, hooks: bool
) -> dict[str, ObservedWeight]:
    standins = _standins(model, on_meta)
    names = {module: name and name + "." for name, module in model.named_modules()}
    weights = {f.name: id(standins[names[f.module] + f.tensor]) for f in found}
    observations = {weight: ObservedWeight() for weight in weights.values()}
    watch = Observer(observations, _to_label(found, weights))
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
    return {name: observations[weight] for name, weight in weights.items()}


def _hooks(module: nn.Module, enter: Any, leave: Any) -> Iterable[Any]:
    return module.register_forward_pre_hook(enter), module.register_forward_hook(leave)


def _to_label(found: Iterable[FoundProjection], weights: dict[str, int]) -> Iterable[int]:
    """One of each kind of attention with several roles in one weight, by shape."""
    kinds: dict[tuple[str, torch.Size], int] = {}
    for each in found:
        if len(each.roles) > 1:
            kinds.setdefault(alike(each), weights[each.name])
    return kinds.values()


def alike(found: FoundProjection) -> tuple[str, torch.Size]:
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
