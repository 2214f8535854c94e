"""``fused-lora tune``: time the candidate tiles of a model's projections and keep the winners."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import cast

import torch

from fused_lora.bench.clock import Clock, clock_for
from fused_lora.bench.options import positive, seconds_of
from fused_lora.bench.phases import Shares
from fused_lora.bench.roofline import Linear
from fused_lora.bench.shapes import SHAPES
from fused_lora.bench.timing import Times, interleave
from fused_lora.bench.tune.launched import Launched, launched
from fused_lora.kernels.triton import available, winners
from fused_lora.kernels.triton.launches import Launch, tile_of
from fused_lora.kernels.triton.winners import MeasuredTile
from fused_lora.trust.everything import launches
from fused_lora.trust.subjects import of_launch
from fused_lora.trust.verify import verdict

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
        winners.store(device, found)
    print(f"kept in {winners.path()}; heard by every process that starts from now on")
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
        for launch in launches(dtype, device)
        if launch.kernel == job.kernel and verdict(of_launch(launch, key), device).passed
    ]
    steps = {str(i): _step(job, launch) for i, launch in enumerate(right)}
    if not steps:
        return {}
    found = interleave(steps, clock, budget_s, warmup=2)
    return {right[int(name)]: times for name, times in found.items()}


def _step(job: Launched, launch: Launch):
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
