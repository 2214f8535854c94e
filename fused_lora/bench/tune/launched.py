"""The launches of one adapted projection, each callable in any tile of its kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_lora.bench.roofline import Linear
from fused_lora.kernels.interface import Adapters
from fused_lora.kernels.triton.winners import key
from fused_lora.plan.strategies import ONE_PASS_RANKS
from fused_lora.types import Span


@dataclass(frozen=True)
class Launched:
    """One launch."""

    kernel: str
    shape: tuple[int, int, int]  # rows, columns, depth, as ``launches`` counts them
    dtype: torch.dtype
    run: Callable[[Any], object]  # in a given tile

    @property
    def key(self) -> str:
        """What its winner is kept under."""
        return key(self.kernel, *self.shape, self.dtype)


def launched(size: Linear, dtype: torch.dtype, device: torch.device) -> Iterator[Launched]:
    """Forward, input gradient and adapter gradients of ``size``, on random operands."""
    from fused_lora.kernels.triton import lora_extended, lora_grad, lora_one_pass, lora_shrink
    from fused_lora.kernels.triton.border import packed

    m, k, n, r = size.m, size.k, size.n, size.rank
    p = Operands(size, dtype, device)

    def of(kernel: str, rows: int, columns: int, depth: int, run: Callable[[Any], object]):
        return Launched(kernel, (rows, columns, depth), dtype, run)

    x, w, bias, dy, own, h, dh = p.x, p.w, p.bias, p.dy, p.adapters, p.h, p.dh
    ab = packed(own, dtype)  # as a pass does, once
    yield of("shrink", m, r, k, lambda t: lora_shrink.shrink(x, ab, tile=t))
    yield of("shrink", m, r, n, lambda t: lora_shrink.shrink_grad(dy, ab, tile=t))
    yield of("extended", m, n, k, lambda t: lora_extended.forward(x, w, bias, ab, h=h, tile=t))
    yield of("extended", m, k, n, lambda t: lora_extended.input_grad(dy, w, ab, dh=dh, tile=t))
    yield of("grad", r, k, m, lambda t: lora_grad.a_grads(dh, x, own, tile=t))
    yield of("grad", r, n, m, lambda t: lora_grad.b_grads(h, dy, own, tile=t))
    if r <= ONE_PASS_RANKS:
        yield of("one_pass", m, n, k, lambda t: lora_one_pass.forward(x, w, bias, ab, tile=t))
        yield of("one_pass", m, k, n, lambda t: lora_one_pass.input_grad(dy, w, ab, tile=t))


class Operands:
    """Random tensors of one projection; a time does not depend on their values."""

    def __init__(self, size: Linear, dtype: torch.dtype, device: torch.device) -> None:
        m, k, n, r = size.m, size.k, size.n, size.rank
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int, to: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(to)

        self.x, self.w, self.bias, self.dy = draw(m, k), draw(n, k), draw(n), draw(m, n)
        self.h, self.dh = draw(m, r), draw(m, r)
        a, b = (self._adapters(draw, size, wide) for wide in (False, True))
        width, rank = n // size.adapters, r // size.adapters
        spans = [Span(g * width, (g + 1) * width, rank) for g in range(size.adapters)]
        self.adapters = Adapters(a, b, [1.0] * size.adapters, spans)

    def _adapters(self, draw: Callable[..., Tensor], size: Linear, wide: bool) -> list[Tensor]:
        rank = size.rank // size.adapters
        shape = (size.n // size.adapters, rank) if wide else (rank, size.k)
        return [draw(*shape, to=torch.float32) for _ in range(size.adapters)]
