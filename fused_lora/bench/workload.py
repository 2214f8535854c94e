"""One network with its input, and the adapters that every method starts from."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain

import torch
from torch import Tensor, nn

from fused_lora.bench.roofline import Linear
from fused_lora.bench.shapes import ModelShape

# One naming of adapters for every method, so that values and gradients can be compared.
#
# A key is ``<projection>.A`` for one adapter on a projection, and ``<projection>.q.A`` for the
# adapter that owns the q columns of a fused qkv projection; likewise ``B``, ``k`` and ``v``.


PROJECTIONS = ("qkv", "proj", "fc1", "fc2")
THIRDS = ("q", "k", "v")

_ADAPTER = re.compile(
    r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<letter>[AB])"
    r"(?:_(?P<role>[a-z0-9]+))?(?:\.default)?(?:\.weight)?$"
)


def projections(model: nn.Module) -> dict[str, nn.Linear]:
    """Every adapted linear by dotted name: those of ``model.blocks``, or of a set of layers."""
    inside = "blocks." if hasattr(model, "blocks") else ""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name.startswith(inside)
        and name.rpartition(".")[2] in PROJECTIONS
    }


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter parameters of ``model`` by key, whoever put them there."""
    found = {}
    for name, parameter in model.named_parameters():
        if match := _ADAPTER.match(name):
            role = f".{match['role']}" if match["role"] else ""
            found[f"{match['module']}{role}.{match['letter']}"] = parameter
    return found


def thirds(linear: nn.Linear) -> dict[str, tuple[int, int]]:
    """The column range of q, k and v in the output of a fused qkv projection."""
    width = linear.out_features // 3
    return {third: (i * width, (i + 1) * width) for i, third in enumerate(THIRDS)}


def initial_values(model: nn.Module, rank: int, joint: bool, seed: int = 0) -> dict[str, Tensor]:
    """Seeded adapter values for ``model``, exact in bf16, with B small but not zero.

    A zero B would make every gradient of A zero, and its error meaningless.
    """
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name, linear in projections(model).items():
        split = name.endswith("qkv") and not joint
        width = linear.out_features // 3 if split else linear.out_features
        for key in [f"{name}.{third}" for third in THIRDS] if split else [name]:
            a = torch.rand(rank, linear.in_features, generator=generator) * 2 - 1  # [R, K]
            b = torch.randn(width, rank, generator=generator)  # [N, R]
            values[f"{key}.A"] = (a * linear.in_features**-0.5).bfloat16().float()
            values[f"{key}.B"] = (b * (0.02 * rank**-0.5)).bfloat16().float()
    return values


@torch.no_grad()
def copy_adapters(values: Mapping[str, Tensor], model: nn.Module) -> None:
    """Write ``values`` into the adapters of ``model``.

    Raises:
        ValueError: the two sets of keys differ.
    """
    into = adapters(model)
    if odd := sorted(values.keys() ^ into.keys()):
        raise ValueError(f"adapters on one side only: {odd[:4]} ({len(odd)} in all)")
    for key, parameter in into.items():
        parameter.copy_(values[key])


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The adapter gradients of ``model`` by key; zeros where none arrived."""
    return {
        key: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for key, parameter in adapters(model).items()
    }


Outcome = dict[str, list[Tensor]]  # the tensors of each quantity: y, dx, da, db

COMPUTE = {"fp32": torch.float32, "bf16": torch.bfloat16, "amp": torch.bfloat16}
STORED = {"fp32": torch.float32, "bf16": torch.bfloat16, "amp": torch.float32}


def share(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose modules are new and whose parameters and buffers are the same."""
    kept = {id(t): t for t in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, kept)


def precision(dtype: str, device: str) -> AbstractContextManager[object]:
    """Autocast when the dtype asks for it."""
    if dtype != "amp":
        return nullcontext()
    return torch.autocast(device.partition(":")[0], torch.bfloat16)


class Workload:
    """One shape in one dtype on one device; suites fill in the passes.

    Attributes:
        base: The frozen network, shared by every method.
        inputs: The tensors of one step, the first dimension their batch.
    """

    base: nn.Module
    inputs: list[Tensor]
    counts_host = False  # whether Python calls and dispatched operations are counted

    def __init__(self, shape: ModelShape, batch: int, dtype: str, device: str) -> None:
        self.shape, self.batch, self.dtype, self.device = shape, batch, dtype, device
        self.stored, self.compute = STORED[dtype], COMPUTE[dtype]

    @property
    def activation(self) -> int:
        """Elements of one [M, d] tensor."""
        return self.batch * self.shape.tokens * self.shape.width

    def precision(self) -> AbstractContextManager[object]:
        """Autocast when the dtype asks for it."""
        return precision(self.dtype, self.device)

    def forward(self, model: nn.Module, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        """The outputs of one pass."""
        raise NotImplementedError

    def backward(self, outputs: tuple[Tensor, ...]) -> None:
        """Send a gradient back from ``outputs``."""
        raise NotImplementedError

    def linears(self, rank: int) -> list[Linear]:
        """The projections that a step consists of; none where it is more than those."""
        return []

    def sections(self, model: nn.Module) -> Iterable[nn.Module]:
        """The blocks whose saved bytes are told apart."""
        return ()

    def excluded(self) -> list[Tensor]:
        """Tensors alive whatever the method saves."""
        return []

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer | None:
        """What ends a step, if anything."""
        return None

    def outcome(self, model: nn.Module, inputs: list[Tensor], exact: bool = False) -> Outcome:
        """Outputs and gradients of one pass over ``inputs``, without autocast when exact."""
        model.zero_grad(set_to_none=True)
        with nullcontext() if exact else self.precision():
            outputs = self.forward(model, inputs)
        self.backward(outputs)
        found = gradients(model)
        entered = [t.grad for t in inputs if t.grad is not None]
        result = {
            "y": [output.detach() for output in outputs],
            "da": [found[key] for key in sorted(found) if key.endswith("A")],
            "db": [found[key] for key in sorted(found) if key.endswith("B")],
        } | ({"dx": entered} if entered else {})
        model.zero_grad(set_to_none=True)
        return {quantity: tensors for quantity, tensors in result.items() if tensors}


def trunk(model: nn.Module) -> nn.Module | None:
    """The module that holds the blocks, however it is wrapped; None for a set of layers."""
    return next((module for module in model.modules() if "blocks" in module._modules), None)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks, first to last."""
    holder = trunk(model)
    return list(holder.get_submodule("blocks").children()) if holder else []


@contextmanager
def shallow(model: nn.Module, depth: int) -> Iterator[nn.Module]:
    """``model`` with its first ``depth`` blocks alone: the very modules, for the time being."""
    holder = trunk(model)
    if holder is None:
        yield model
        return
    whole = holder.get_submodule("blocks")
    holder.blocks = nn.Sequential(*list(whole.children())[:depth])
    try:
        yield model
    finally:
        holder.blocks = whole
