"""What a careful user writes by hand: the expand accumulates into the frozen output.

forward   h = x aT,  y = x wT + bias,  y += h bT           y in place, one pass over it saved
backward  dh = dy b, dx = dy w,  dx += dh a,  db = dyT h,  da = dhT x
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fused_lora.bench.adapters import projections, thirds
from fused_lora.bench.contenders.naive import replace
from fused_lora.bench.registry import Contender, register

Spans = tuple[tuple[int, int], ...]  # columns of y, one range for each adapter


class AddmmLoRA(torch.autograd.Function):
    """One frozen linear and its adapters over flattened rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor, spans: Spans, *ab: Tensor) -> Tensor:
        """Returns y [M, N] of x [M, K], w [N, K], bias [N] and the pairs a [R, K], b [N_g, R]."""
        y = torch.addmm(bias, x, w.t())
        hidden = []
        for (start, stop), a, b in zip(spans, ab[::2], ab[1::2], strict=True):
            hidden.append(x @ a.t())  # [M, R]
            y[:, start:stop].addmm_(hidden[-1], b.t())
        ctx.spans = spans
        ctx.save_for_backward(x, w, *ab, *hidden)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Returns dx and the pairs da, db."""
        x, w, *rest = ctx.saved_tensors
        pairs, hidden = rest[: 2 * len(ctx.spans)], rest[2 * len(ctx.spans) :]
        dx = dy @ w if ctx.needs_input_grad[0] else None
        grads = []
        for (start, stop), a, b, h in zip(ctx.spans, pairs[::2], pairs[1::2], hidden, strict=True):
            dy_g = dy[:, start:stop]
            dh = dy_g @ b
            if dx is not None:
                dx.addmm_(dh, a)
            grads += [dh.t() @ x, dy_g.t() @ h]
        return dx, None, None, None, *grads


class AddmmLinear(nn.Module):
    """A projection that runs AddmmLoRA, its adapters named as everywhere."""

    def __init__(self, base: nn.Linear, spans: dict[str, tuple[int, int]], rank: int) -> None:
        super().__init__()
        self.base, self.spans, self.names = base, tuple(spans.values()), []
        for suffix, (start, stop) in spans.items():
            for letter, shape in ("A", (rank, base.in_features)), ("B", (stop - start, rank)):
                self.names.append(f"lora_{letter}{suffix}")
                value = nn.Parameter(base.weight.new_zeros(shape))
                self.register_parameter(self.names[-1], value)

    def forward(self, x: Tensor) -> Tensor:
        """The adapted output, in the autocast dtype where autocast is on."""
        device, dtype = x.device.type, x.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        operands = (self.base.weight, self.base.bias, *(getattr(self, n) for n in self.names))
        w, bias, *ab = (operand.to(dtype) for operand in operands)
        with torch.autocast(device, enabled=False):
            y = AddmmLoRA.apply(x.to(dtype).flatten(0, -2), w, bias, self.spans, *ab)
        return y.unflatten(0, x.shape[:-1])


@register
class Addmm(Contender):
    """In-place composition of library GEMMs, q, k and v adapted separately."""

    name, title = "addmm", "addmm_ by hand"

    def install(self, model: nn.Module, rank: int) -> nn.Module:
        """Wrap every projection."""
        for name, linear in projections(model).items():
            spans = {f"_{third}": span for third, span in thirds(linear).items()}
            whole = {"": (0, linear.out_features)}
            spans = spans if name.endswith("qkv") else whole
            replace(model, name, AddmmLinear(linear, spans, rank))
        return model
