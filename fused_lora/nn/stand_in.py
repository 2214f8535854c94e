"""May another forward stand in for this module's? One sentence for each no; and is it as it was?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import FunctionType, MethodType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.fx import _symbolic_trace
from torch.nn.modules import module as torch_module
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# May another forward stand in for this module's? One place that answers, one sentence for each no.
#
# A class that is swapped in computes what the *class* computed. It loses to a forward bound to the
# instance, does not know of a forward put into the class later, and reads a parameter that a
# parametrisation or a pruning hook may have taken away. Every function here returns the sentence,
# or None where nothing is in the way; none of them looks at a tensor's values.


OF_TORCH = "torch.nn.utils."  # its pre-hooks make the weight: pruning, weight and spectral norm


def why_not_replaceable(module: nn.Module, tensor: str = "weight") -> str | None:
    """Why no class can stand in for the forward of ``module``, which reads its own ``tensor``."""
    return (
        why_not_called(module)
        or made_weight(module, tensor)
        or odd_weight(module._parameters.get(tensor))
    )


def why_not_called(module: nn.Module) -> str | None:
    """Why calling ``module`` is not the forward that its class was written with."""
    return bound_forward(module) or offloaded(module) or replaced_forward(type(module))


def bound_forward(module: nn.Module) -> str | None:
    """A forward of the instance's own, which goes before any class's; accelerate's is no such."""
    forward = module.__dict__.get("forward")
    if forward is None or "_hf_hook" in module.__dict__:
        return None
    return (
        f"a forward is bound to the instance ({_name_of(forward)}), and goes before any class's: "
        "delete the attribute `forward`, or leave the module out"
    )


def device_hook(module: nn.Module) -> str | None:
    """A hook of accelerate's, which calls the class's forward between moves from device to device.

    A linear can be adapted under it (``rebind``); nothing is fused over it.
    """
    hook = module.__dict__.get("_hf_hook")
    return None if hook is None else f"accelerate's {type(hook).__name__} runs around its forward"


def offloaded(module: nn.Module) -> str | None:
    """A hook of accelerate's that takes the weights away between two forwards."""
    for hook in _each(module.__dict__.get("_hf_hook")):
        if getattr(hook, "offload", False) or type(hook).__name__ == "CpuOffload":
            return (
                f"accelerate's {type(hook).__name__} keeps its weights elsewhere between two "
                "forwards: patch first and offload then, or call "
                "accelerate.hooks.remove_hook_from_submodules(model) before"
            )
    return None


def replaced_forward(cls: type[nn.Module]) -> str | None:
    """A forward put into the class after it was written; what it was written with is known."""
    forward: Any = cls.forward
    if forward not in _replaced:
        owner = next(base for base in cls.__mro__ if "forward" in vars(base))
        _replaced[forward] = not _written_with(forward, owner)
    if not _replaced[forward]:
        return None
    return (
        f"the forward of class {cls.__name__} was replaced by {_name_of(forward)}, "
        "which was not read here"
    )


_replaced: dict[Any, bool] = {}  # by the function, so that asking again costs one look-up


def _written_with(forward: Any, owner: type) -> bool:
    if owner is nn.Module:  # which has a placeholder there
        return True
    if not isinstance(forward, FunctionType) or hasattr(forward, "__wrapped__"):
        return False
    if forward.__qualname__ != f"{owner.__qualname__}.forward":
        return False
    others = (each for each in vars(owner).values() if isinstance(each, FunctionType))
    files = {each.__code__.co_filename for each in others if each is not forward}
    return not files or forward.__code__.co_filename in files


def made_weight(module: nn.Module, tensor: str = "weight") -> str | None:
    """A weight that is no parameter but made anew from others, by whom."""
    if is_parametrized(module, tensor):
        names = [type(each).__name__ for each in module.parametrizations[tensor]]  # type: ignore[union-attr,index]
        return (
            f"its {tensor} is parametrized by {', '.join(names)}: call "
            f"torch.nn.utils.parametrize.remove_parametrizations(module, {tensor!r}) first"
        )
    if module._buffers.get(tensor) is not None:
        return (
            f"its {tensor} is a buffer, as remove_parametrizations leaves it where it was frozen: "
            f"make it a parameter again, module.{tensor} = torch.nn.Parameter(module.{tensor})"
        )
    if module._parameters.get(tensor) is not None or tensor not in module.__dict__:
        return None
    hooks = [hook for hook in module._forward_pre_hooks.values() if of_torch(hook)]
    if any(isinstance(hook, BasePruningMethod) for hook in hooks):
        return (
            f"its {tensor} is made from {tensor}_orig and {tensor}_mask by torch.nn.utils.prune: "
            f"call torch.nn.utils.prune.remove(module, {tensor!r}) first, which keeps the zeros"
        )
    who = ", ".join(type(hook).__name__ for hook in hooks) or "somebody else"
    return f"its {tensor} is no parameter but made by {who}: take that off first"


def own_tensor(module: nn.Module, tensor: str = "weight") -> Tensor:
    """What a read of ``tensor`` of ``module`` itself gives: its parameter, or what was made of it.

    A copy of DataParallel's holds a plain tensor in its place, a pruned linear what its hook made.
    """
    for held in (module._parameters, module._buffers):
        if (weight := held.get(tensor)) is not None:
            return weight
    if tensor in module.__dict__:
        return module.__dict__[tensor]
    if is_parametrized(module, tensor):
        return module.parametrizations[tensor]()  # type: ignore[union-attr,index,operator]
    raise AttributeError(f"{type(module).__name__} has no {tensor}")


def odd_weight(weight: Tensor | None) -> str | None:
    """A weight whose type computes in a way of its own."""
    if weight is None or not is_traceable_wrapper_subclass(weight):
        return None
    return (
        f"its weight is a {type(weight).__name__}, not a plain tensor: keep_forward=True leaves it "
        "alone and adds the adapters to the linear's result"
    )


def version_of(tensor: Tensor) -> int:
    """How often ``tensor`` was written; -1 under inference mode, where nobody counts."""
    return -1 if tensor.is_inference() else tensor._version


def of_torch(hook: Callable[..., Any]) -> bool:
    """Whether a hook is one of torch's own that make a weight before each forward."""
    holder: Any = getattr(hook, "__self__", hook)
    kind = type(holder) if not isinstance(holder, FunctionType) else holder
    return f"{kind.__module__}.".startswith(OF_TORCH)


def rebind(module: nn.Module, was: type[nn.Module]) -> None:
    """After ``module`` changed its class from ``was``: accelerate's hook calls the new forward."""
    old = module.__dict__.get("_old_forward")
    if not isinstance(old, MethodType) or old.__self__ is not module:
        return
    if any(vars(base).get("forward") is old.__func__ for base in was.__mro__):
        module.__dict__["_old_forward"] = MethodType(type(module).forward, module)


def _each(hook: Any) -> Iterator[Any]:
    if hook is not None:
        yield hook
        for inner in getattr(hook, "hooks", ()):
            yield from _each(inner)


def _name_of(forward: Any) -> str:
    inner = getattr(forward, "func", forward)
    return f"{getattr(inner, '__module__', '?')}.{getattr(inner, '__qualname__', inner)}"


# Watching modules that a program stands in for: whether each is still what it was.
#
# A program computes what the forwards of several modules would. Whatever makes calling one of them
# do more or other than its class says (hooks, a forward of its own, another class or another
# forward of its class, a child put in its place) is seen here, at every call, in a few comparisons.


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS = tuple(getattr(torch_module, f"_global{name}") for name in HOOKS)


class Watch:
    """Some modules as they are now, all of them without hooks."""

    __slots__ = ("children", "forwards", "hooks", "kinds")

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.kinds = [(module, module.__dict__, type(module)) for module in modules]
        self.forwards = [(kind, kind.forward) for kind in {type(module) for module in modules}]
        self.hooks = [*(m.__dict__[name] for m in modules for name in HOOKS), *GLOBAL_HOOKS]
        below = [module._modules for module in modules if module._modules]
        self.children = [(own, [*own.values()]) for own in below]

    def intact(self) -> bool:
        """Whether nothing has changed."""
        if any(self.hooks):
            return False
        for module, own, kind in self.kinds:
            if module.__class__ is not kind or "forward" in own:
                return False
        for kind, forward in self.forwards:
            if kind.forward is not forward:
                return False
        for own, before in self.children:  # noqa: SIM110, a call less
            if [*own.values()] != before:
                return False
        return True


def why_watched(*modules: nn.Module) -> str | None:
    """Why calling one of these does more than its class says; None where none does."""
    for module in modules:
        own, kind = module.__dict__, type(module)
        if any(own[name] for name in HOOKS):
            return f"hooks on a {kind.__name__}"
        if "forward" in own:
            return device_hook(module) or f"a {kind.__name__} has a forward of its own"
        if why := replaced_forward(kind):
            return why
    return "hooks on all modules" if any(GLOBAL_HOOKS) else None


# Tools that read a model's Python, not its calls: torch.fx's tracers and TorchScript.
#
# A tracer of torch.fx calls forwards with proxies in place of tensors. An adapted linear is then
# one node, the module itself, as torch.nn.Linear is: the traced model goes on with the same
# parameters, and what decides at each call goes on deciding. TorchScript compiles source, and is
# refused.


def as_one_node(module: nn.Module, proxy: Any, *args: Any, **kwargs: Any) -> Any:
    """The call of ``module`` in the graph that ``proxy`` belongs to, as of any leaf."""
    tracer = proxy.tracer
    path = tracer.path_of_module(module)
    if not path:
        raise RuntimeError(
            f"torch.fx: a {type(module).__name__} is one node of the model that holds it: trace "
            "that, or unpatch first"
        )
    return tracer.create_proxy("call_module", path, args, kwargs)


def refuse_constant(what: str) -> None:
    """Raises RuntimeError where ``what``, made of parameters, would be a constant of a graph."""
    if torch.compiler.is_compiling() or not _symbolic_trace.is_fx_symbolic_tracing():
        return
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    if get_proxy_mode() is None:  # make_fx follows the weight's making
        raise RuntimeError(
            f"torch.fx: {what} is read while a graph is traced, in which it would stay what it is "
            "now: unpatch first: fused_lora.unpatch(model, merge=True) keeps what it computes"
        )


class Unscripted:
    """What a patched model's modules say to ``torch.jit.script``, which asks each of them."""

    unscripted_cure = "unpatch first: fused_lora.unpatch(model, merge=True) keeps what it computes"

    def __prepare_scriptable__(self) -> NoReturn:
        """Raises RuntimeError, before anything of the model is read or changed."""
        raise RuntimeError(
            f"torch.jit.script cannot compile a {type(self).__name__}: {self.unscripted_cure}; "
            "torch.jit.trace and torch.export take the model as it is"
        )
