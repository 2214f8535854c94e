"""``fused-lora tune``: every tile of the Triton kernels on this GPU, the fastest kept."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from fused_lora.bench.clock import Clock, Times, clock_for, interleave
from fused_lora.bench.options import positive, seconds_of
from fused_lora.bench.roofline import Linear
from fused_lora.bench.runner import Shares
from fused_lora.bench.shapes import SHAPES
from fused_lora.kernels.interface import Adapters
from fused_lora.kernels.triton import available, launches
from fused_lora.kernels.triton.launches import Launch, MeasuredTile, key, tile_of
from fused_lora.plan.strategies import ONE_PASS_RANKS
from fused_lora.types import Span
from fused_lora.verify.kernel_registry import launches as every_launch
from fused_lora.verify.kernel_registry import of_launch
from fused_lora.verify.verdicts import verdict


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
    from fused_lora.kernels.triton import lora_extended, lora_grad_rank, lora_one_pass, lora_shrink
    from fused_lora.kernels.triton.border import packed

    m, k, n, r = size.m, size.k, size.n, size.rank
    p = TuneOperands(size, dtype, device)

    def of(
        kernel: str, rows: int, columns: int, depth: int, run: Callable[[Any], object]
    ) -> Launched:
        return Launched(kernel, (rows, columns, depth), dtype, run)

    x, w, bias, dy, own, h, dh = p.x, p.w, p.bias, p.dy, p.adapters, p.h, p.dh
    ab = packed(own, dtype)  # as a pass does, once
    yield of("shrink", m, r, k, lambda t: lora_shrink.shrink(x, ab, tile=t))
    yield of("shrink", m, r, n, lambda t: lora_shrink.shrink_grad(dy, ab, tile=t))
    yield of("extended", m, n, k, lambda t: lora_extended.forward(x, w, bias, ab, h=h, tile=t))
    yield of("extended", m, k, n, lambda t: lora_extended.input_grad(dy, w, ab, dh=dh, tile=t))
    yield of("grad", r, k, m, lambda t: lora_grad_rank.a_grads(dh, x, own, tile=t))
    yield of("grad", r, n, m, lambda t: lora_grad_rank.b_grads(h, dy, own, tile=t))
    if r <= ONE_PASS_RANKS:
        yield of("one_pass", m, n, k, lambda t: lora_one_pass.forward(x, w, bias, ab, tile=t))
        yield of("one_pass", m, k, n, lambda t: lora_one_pass.input_grad(dy, w, ab, tile=t))


class TuneOperands:
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


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GAIN = 1.02  # below it the rule's own tile stays


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="fused-lora tune",
        description="Time the tiles that each kernel may take, and keep the fastest for this "
        "device, driver and version in the cache folder.",
    )
    add = made.add_argument
    add("--model", choices=list(SHAPES), default="vit_base_patch16_224", help="its projections")
    add("--shapes", type=_shapes, metavar="LIST", help="MxKxN, by commas, instead of a model's")
    add("--batch", type=positive, default=(128,), metavar="LIST", help="images of a step (128)")
    add("--rank", type=positive, default=(16,), metavar="LIST", help="of each adapter (16)")
    add("--dtype", choices=list(DTYPES), default="bf16")
    add("--budget-seconds", type=seconds_of, default=60.0, metavar="S")
    add("--device", default="cuda")
    return made


def run(argv: Sequence[str]) -> int:
    """Tune, print and keep.

    Raises:
        RuntimeError: no Triton kernel can run here, with the reason.
    """
    options = parser().parse_args(argv)
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    if reason := available.why_not(device, dtype):
        raise RuntimeError(f"nothing to tune here: {reason}")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    sizes = list(dict.fromkeys(_sizes(options)))
    clock = clock_for(options.device)
    shares = Shares([float(s.m * s.k * s.n) for s in sizes], options.budget_seconds, clock)
    for size in sizes:
        found = dict(tuned(size, dtype, device, clock, shares.next_s()))
        launches.store(device, found)
    print(f"kept in {launches.path()}; read by every process that starts from now on")
    return 0


def tuned(
    size: Linear, dtype: torch.dtype, device: torch.device, clock: Clock, budget_s: float
) -> Iterator[tuple[str, MeasuredTile]]:
    """The winner of each launch of ``size`` that beats the rule's tile, by key."""
    jobs = list(launched(size, dtype, device))
    for job in jobs:
        times = _times(job, dtype, device, clock, budget_s / len(jobs))
        usual = Launch(job.kernel, tile_of(job.kernel, *job.shape, dtype, device))
        best = min(times, key=lambda launch: times[launch].median_ms, default=usual)
        gain = times[usual].median_ms / times[best].median_ms if usual in times else 1.0
        print(f"  {job.key:40} {best.configuration:36} {gain:5.2f}x of {usual.configuration}")
        if gain > GAIN:
            yield job.key, cast(MeasuredTile, best.tile)


def _times(
    job: Launched, dtype: torch.dtype, device: torch.device, clock: Clock, budget_s: float
) -> dict[Launch, Times]:
    """Every tile that this device finds right, timed in turns."""
    key = str(dtype).removeprefix("torch.")
    right = [
        launch
        for launch in every_launch(dtype, device)
        if launch.kernel == job.kernel and verdict(of_launch(launch, key), device).passed
    ]
    steps = {str(i): _step(job, launch) for i, launch in enumerate(right)}
    if not steps:
        return {}
    found = interleave(steps, clock, budget_s, warmup=2)
    return {right[int(name)]: times for name, times in found.items()}


def _step(job: Launched, launch: Launch) -> Callable[[], None]:
    def step() -> None:
        job.run(launch.tile)

    return step


def _sizes(options: argparse.Namespace) -> Iterator[Linear]:
    if options.shapes:
        yield from (Linear(m, k, n, r) for r in options.rank for m, k, n in options.shapes)
        return
    shape = SHAPES[options.model]
    d, hidden = shape.width, shape.expansion * shape.width
    for batch in options.batch:
        for rank in options.rank:
            m = batch * shape.tokens
            yield Linear(m, d, 3 * d, 3 * rank, 3)
            yield from (Linear(m, k, n, rank) for k, n in ((d, d), (d, hidden), (hidden, d)))


def _shapes(text: str) -> tuple[tuple[int, int, int], ...]:
    found = []
    for word in text.split(","):
        sizes = word.split("x")
        if len(sizes) != 3 or not all(size.isdecimal() and int(size) for size in sizes):
            raise argparse.ArgumentTypeError(f"{word!r} is not MxKxN")
        found.append((int(sizes[0]), int(sizes[1]), int(sizes[2])))
    return tuple(found)
