"""What a suite races: one base network, its inputs, a forward and a backward pass."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from itertools import chain

import torch
from torch import Tensor, nn

from fused_lora.bench.adapters import gradients
from fused_lora.bench.gate import Outcome
from fused_lora.bench.roofline import Linear
from fused_lora.bench.shapes import Shape

COMPUTE = {"fp32": torch.float32, "bf16": torch.bfloat16, "amp": torch.bfloat16}
STORED = {"fp32": torch.float32, "bf16": torch.bfloat16, "amp": torch.float32}


def share(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose modules are new and whose parameters and buffers are the same."""
    kept = {id(t): t for t in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, kept)


def precision(dtype: str, device: str) -> AbstractContextManager:
    """Autocast when the dtype asks for it."""
    if dtype != "amp":
        return nullcontext()
    return torch.autocast(device.partition(":")[0], torch.bfloat16)


class Workload:
    """One shape in one dtype on one device; suites fill in the passes.

    Attributes:
        base: The frozen network, shared by every contender.
        inputs: The tensors of one step, the first dimension their batch.
    """

    base: nn.Module
    inputs: list[Tensor]
    counts_host = False  # whether Python calls and dispatched operations are counted

    def __init__(self, shape: Shape, batch: int, dtype: str, device: str) -> None:
        self.shape, self.batch, self.dtype, self.device = shape, batch, dtype, device
        self.stored, self.compute = STORED[dtype], COMPUTE[dtype]

    @property
    def activation(self) -> int:
        """Elements of one [M, d] tensor."""
        return self.batch * self.shape.tokens * self.shape.width

    def precision(self) -> AbstractContextManager:
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
        """Tensors alive whatever the contender saves."""
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
