"""Tools that read a model's Python, not its calls: torch.fx's tracers and TorchScript.

A tracer of torch.fx calls forwards with proxies in place of tensors. An adapted linear is then one
node, the module itself, as torch.nn.Linear is: the traced model goes on with the same parameters,
and what decides at each call goes on deciding. TorchScript compiles source, and is refused.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import nn
from torch.fx import Proxy, _symbolic_trace


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


def proxy_in(*args: Any, **kwargs: Any) -> Proxy | None:
    """The first proxy among the arguments of a call."""
    return next((each for each in (*args, *kwargs.values()) if isinstance(each, Proxy)), None)


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
