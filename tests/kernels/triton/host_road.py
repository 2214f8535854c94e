"""Run over ``stub_driver.c``: a block's programs with Triton's launches, and what they launch.

Prints a line for each launch of a step: the kernel, and whether the bound call hands the compiled
kernel what ``kernel[grid]`` would. With ``--times``, microseconds of both, and of the whole step,
of which a CPU's attention, here in place of a launch, is named apart.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

os.environ |= {"FUSED_LORA_VERIFY": "off", "FUSED_LORA_CALIBRATE": "0"}

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

import fused_lora
from fused_lora.kernels.interface import Adapters
from fused_lora.kernels.triton import launch, lora_extended, tiles
from fused_lora.plan import cost_kernels, strategies
from fused_lora.programs import run
from fused_lora.programs.describe import name_of
from fused_lora.types import Span
from tests.kernels.triton import stub

ARCH = 90


def serve() -> None:
    """Triton's kernels serve CPU tensors, unchecked, and win every plan."""
    stub.serve(ARCH, told="--times" not in sys.argv)
    cost_kernels.TRITON_EFFICIENCY, cost_kernels.TRITON_LAUNCH_CALLS = 1e6, 0.0
    cost_kernels.MERGE_EFFICIENCY = 1e-9
    strategies.ONE_PASS_RANKS = 0


class Net(nn.Module):
    """One block of ViT-B."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(768, 12, qkv_bias=True))

    def forward(self, x: Tensor) -> Tensor:
        """y [B, T, 768]."""
        return self.blocks(x)


def step_of_block() -> Callable[[], None]:
    """Forward and backward of a patched block on a few tokens, warm."""
    model = Net().to(torch.bfloat16)
    x = torch.randn(1, 8, 768, dtype=torch.bfloat16, requires_grad=True)
    fused_lora.patch(model, rank=16, example_input=x.detach())

    trained = [x, *(p for p in model.parameters() if p.requires_grad)]

    def step() -> None:
        for each in trained:
            each.grad = None
        y = model(x)
        y.backward(y)

    for _ in range(3):
        step()
    return step


class Bulk:
    """An operation whose one product reads by tensor descriptors."""

    def forward(self, inputs: Any, needs: Any) -> Any:
        """y of x, w, a and b."""
        x, w, a, b = inputs
        adapters = Adapters([a], [b], [0.5], [Span(0, w.shape[0], a.shape[0])])
        tile = next(
            t for t in tiles.candidates(ARCH, 2, False, True) if isinstance(t, tiles.BulkTile)
        )
        return lora_extended.forward(x, w, None, adapters, tile=tile).y, ((), None)


def bulk() -> None:
    """Run it twice: bound the second time."""
    made = (
        torch.zeros(*size, dtype=torch.bfloat16)
        for size in ((256, 128), (256, 128), (16, 128), (256, 16))
    )
    inputs, operation = list(made), Bulk()
    for _ in range(2):
        run.call(operation, inputs)


def flat(argument: Any) -> Any:
    """What of an argument reaches the device."""
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    if isinstance(argument, tuple):
        return [flat(each) for each in argument]
    if type(argument).__name__ == "TensorDescriptor":
        sizes = (argument.shape, argument.strides, argument.block_shape)
        return [argument.base.data_ptr(), *map(list, sizes)]
    return argument


def told(bound: launch.BoundLaunch, args: Any, call: Callable[[], None]) -> list[Any]:
    """What ``call`` hands to the compiled kernel: grid, stream, function, and its arguments."""
    found: list[Any] = []
    compiled = compiled_of(bound)
    right = compiled._run
    spy = lambda *given: found.append([*given[:5], flat(tuple(given[9:]))])  # noqa: E731
    try:
        compiled._run = spy
        before = bound._bound
        bound._bound = (spy, *before[1:])
        call()
    finally:
        compiled._run, bound._bound = right, before
    (one,) = found
    return one


def compiled_of(bound: launch.BoundLaunch) -> Any:
    """The compiled kernel that it is bound to."""
    caches = bound.kernel.device_caches[0][0].values()
    return next(each for each in caches if each._run is bound._bound[0])


def microseconds(call: Callable[[], Any], times: int) -> float:
    """The tenth percentile."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return 1e6 * sorted(taken)[times // 10]


def attention_us() -> Iterator[float]:
    """What the CPU's attention of ``step_of_block`` takes, forward and backward."""
    aten = torch.ops.aten
    q = torch.randn(1, 12, 8, 64, dtype=torch.bfloat16)
    ahead, back = (
        aten._scaled_dot_product_flash_attention_for_cpu,
        aten._scaled_dot_product_flash_attention_for_cpu_backward,
    )
    y, log_sum_exp = ahead(q, q, q)
    yield microseconds(lambda: ahead(q, q, q), 300)
    yield microseconds(lambda: back(y, q, q, q, y, log_sum_exp, 0.0, False), 300)


def main() -> None:
    """See above."""
    torch.set_num_threads(1)
    serve()
    step = step_of_block()
    launched: dict[launch.BoundLaunch, Any] = {}
    right = launch.BoundLaunch.__call__

    def noted(self: launch.BoundLaunch, *args: Any) -> None:
        launched[self] = args
        right(self, *args)

    launch.BoundLaunch.__call__ = noted
    step()
    bulk()
    launch.BoundLaunch.__call__ = right
    for bound, args in launched.items():
        named = [launch._formed(form, arg) for form, arg in zip(bound.forms, args, strict=True)]
        usual = lambda b=bound, n=named: b.kernel[b.grid](*n, **b.constants)  # noqa: E731
        ours = lambda b=bound, a=args: b(*a)  # noqa: E731
        same = told(bound, args, ours) == told(bound, args, usual)
        words = f"{bound.__name__} {'same' if same else 'OTHER ARGUMENTS'}"
        if "--times" in sys.argv:
            taken = microseconds(ours, 400), microseconds(usual, 200)
            words += f" bound {taken[0]:.1f} us, kernel[grid] {taken[1]:.1f} us"
        print(words)
    calls = [name_of(c) for p in run.programs() for c in (*p.calls, *p.calls_back) if not c.view]
    print(f"programs {len(run.programs())}, calls {len(calls)}")
    if "--times" in sys.argv:
        whole, attention = microseconds(step, 300), sum(attention_us())
        print(f"block, forward and backward {whole:.0f} us, of it attention {attention:.0f} us")


if __name__ == "__main__":
    main()
