"""``fused-lora tune``: every tile of the Triton kernels, and of the compiled product where it is
there, on this GPU; the fastest kept."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_lora.bench.clock import Clock, Times, clock_for, interleave
from fused_lora.bench.options import positive, seconds_of
from fused_lora.bench.roofline import Linear
from fused_lora.bench.runner import Shares
from fused_lora.bench.shapes import SHAPES
from fused_lora.kernels.cuda import lora_extended as compiled
from fused_lora.kernels.cuda import lora_linear as hopper
from fused_lora.kernels.interface import Adapters
from fused_lora.kernels.triton import available, launches
from fused_lora.kernels.triton.launches import Launch, key, tile_of
from fused_lora.plan.strategies import ONE_PASS_RANKS
from fused_lora.types import Span
from fused_lora.verify.kernel_registry import Checked, of_compiled_product, of_launch
from fused_lora.verify.kernel_registry import launches as every_launch
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

    def usual(self, device: torch.device) -> Launch:
        """In the tile that serves now."""
        return Launch(self.kernel, tile_of(self.kernel, *self.shape, self.dtype, device))

    def every(self, device: torch.device) -> Iterator[tuple[Launch, Checked]]:
        """In each tile that it may take, and what checks that."""
        name = str(self.dtype).removeprefix("torch.")
        for launch in every_launch(self.dtype, device):
            if launch.kernel == self.kernel:
                yield launch, of_launch(launch, name)

    def store(self, device: torch.device, tile: Any) -> None:
        """Keep the winner."""
        launches.store(device, {self.key: tile})


class CompiledLaunch(NamedTuple):
    """The compiled product in a tile."""

    tile: compiled.ProductTile

    @property
    def configuration(self) -> str:
        """The tile in a few words."""
        return str(self.tile)


@dataclass(frozen=True)
class CompiledProduct(Launched):
    """One launch of the compiled product."""

    ranks: int = 0
    right: str = "rows"  # how w lies; columns for dx

    @property
    def key(self) -> str:
        """What its winner is kept under."""
        return compiled.key(*self.shape, self.dtype, self.right)

    def usual(self, device: torch.device) -> Any:
        """In the tile that serves now."""
        how = (self.dtype, device, self.right)
        return CompiledLaunch(compiled.tile_of(*self.shape, self.ranks, *how))

    def every(self, device: torch.device) -> Iterator[tuple[Any, Checked]]:
        """In each of its tiles, and what checks that."""
        name = str(self.dtype).removeprefix("torch.")
        for tile in compiled.TILES:
            yield CompiledLaunch(tile), of_compiled_product(tile, name)

    def store(self, device: torch.device, tile: Any) -> None:
        """Keep the winner."""
        compiled.store(device, {self.key: tile})


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


def compiled_products(
    size: Linear, dtype: torch.dtype, device: torch.device
) -> Iterator[CompiledProduct]:
    """y and dx of ``size`` by the compiled product; none where it does not take these sizes."""
    m, k, n, r = size.m, size.k, size.n, size.rank
    p = TuneOperands(size, dtype, device)
    x, w, bias, dy, h, dh = p.x, p.w, p.bias, p.dy, p.h, p.dh
    ab = p.adapters.to(dtype)
    if reason := compiled.why_not(x, w, ab) or compiled.why_not(dy, w, ab):
        print(f"  {m}x{n}x{k}: the compiled product is not timed: {reason}")
        return

    def forward(tile: Any) -> object:
        return compiled.forward(x, w, bias, ab, h=h, tile=tile)

    def input_grad(tile: Any) -> object:
        return compiled.input_grad(dy, w, ab, dh, tile)

    yield CompiledProduct("lora_linear", (m, n, k), dtype, forward, r)
    yield CompiledProduct("lora_linear", (m, k, n), dtype, input_grad, r, "columns")


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
        RuntimeError: neither Triton's kernels nor the compiled product can run here, with reasons.
    """
    options = parser().parse_args(argv)
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    rooms = {launched: available.why_not(device, dtype)}
    rooms[compiled_products] = _why_not_compiled(device, dtype)
    if all(rooms.values()):
        raise RuntimeError("nothing to tune here: " + "; ".join(map(str, rooms.values())))
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    sizes = list(dict.fromkeys(_sizes(options)))
    clock = clock_for(options.device)
    shares = Shares([float(s.m * s.k * s.n) for s in sizes], options.budget_seconds, clock)
    for reason in filter(None, rooms.values()):
        print(f"not timed: {reason}")
    for size in sizes:
        jobs = [job for of, no in rooms.items() if not no for job in of(size, dtype, device)]
        tune(jobs, device, clock, shares.next_s())
    print(f"kept in {launches.path()}; read by every process that starts from now on")
    return 0


def _why_not_compiled(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype not in compiled.DTYPES:
        return f"the compiled product is for 16 bits, got {dtype}"
    return hopper.why_not(device)


def tune(jobs: Sequence[Launched], device: torch.device, clock: Clock, budget_s: float) -> None:
    """Time each launch, and keep the winner of each that beats the tile that serves now."""
    for job in jobs:
        times = _times(job, device, clock, budget_s / len(jobs))
        usual = job.usual(device)
        best = min(times, key=lambda launch: times[launch].median_ms, default=usual)
        gain = times[usual].median_ms / times[best].median_ms if usual in times else 1.0
        name = job.key if job.kernel in job.key else f"{job.kernel} {job.key}"
        print(f"  {name:40} {best.configuration:36} {gain:5.2f}x of {usual.configuration}")
        if gain > GAIN:
            job.store(device, best.tile)


def _times(
    job: Launched, device: torch.device, clock: Clock, budget_s: float
) -> dict[Launch, Times]:
    """Every tile that this device finds right, timed in turns."""
    right = [launch for launch, one in job.every(device) if verdict(one, device).passed]
    steps = {str(i): _step(job, launch) for i, launch in enumerate(right)}
    if not steps:
        return {}
    found = interleave(steps, clock, budget_s, warmup=2)
    return {right[int(name)]: times for name, times in found.items()}


def _step(job: Launched, launch: Any) -> Callable[[], None]:
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
