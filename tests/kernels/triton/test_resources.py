"""Every shipped configuration on every architecture: what it takes of the chip, without one.

No register spilled, shared memory within the chip's limit, the chip's matrix instruction in the
big product, loads asynchronous. Compiled code is kept in pytest's cache under Triton's own key: the
sources, the options and the version. bfloat16 stands for float16, which differs in one letter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fused_lora.kernels.interface import Adapters
from fused_lora.kernels.triton import lora_extended, lora_grad, lora_one_pass, lora_shrink
from fused_lora.kernels.triton.lora_merge import lora_merge
from fused_lora.kernels.triton.tiles import Tile, candidates, one_pass_candidates, shared_bytes
from fused_lora.types import Span
from tests.kernels.triton.compiler import Resources, compiled

ARCHS = {80: "mma.sync", 89: "mma.sync", 90: "wgmma.", 100: "tcgen05.mma", 120: "mma.sync"}
CLASSES = {"bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}
BIG = ("_extended", "_one_pass")  # where the chip's own matrix instruction must be
M, K, N = 512, 768, 768  # a ViT-B projection; sizes that 16 divides, as every model has

Launch = Callable[[], object]


def group(groups: int, rank: int) -> Adapters:
    """fp32 adapters over equal parts of N."""
    width = N // groups
    spans = tuple(Span(g * width, g * width + width, rank) for g in range(groups))
    a, b = torch.zeros(rank, K), torch.zeros(width, rank)
    return Adapters([a] * groups, [b] * groups, (1.0,) * groups, spans)


def thin_launches(x: Tensor) -> Iterator[Launch]:
    """Shrink, the gradients and the merge, with the smallest rank block and the largest."""
    for adapters in (group(1, 16), group(3, 64)):
        h = x.new_zeros(M, adapters.rank)
        yield lambda a=adapters: lora_shrink.shrink(x, a)
        yield lambda a=adapters: lora_shrink.shrink_grad(x, a)
        yield lambda a=adapters, h=h: lora_grad.a_grads(h, x, a)
        yield lambda a=adapters: lora_merge(x.new_zeros(N, K), *a)
        if x.dtype is torch.bfloat16:
            yield lambda a=adapters: lora_merge(x.new_zeros(N, K), *a, noise=(1, 2))


def gemm_launches(x: Tensor, arch: int) -> Iterator[Launch]:
    """The extended GEMM in every tile: forward, forward with GELU, and dx."""
    w, bias = x.new_zeros(N, K), x.new_zeros(N)
    one, three = group(1, 16), group(3, 64)
    h, h3 = x.new_zeros(M, 16), x.new_zeros(M, 192)
    for tile in candidates(arch, x.element_size()):
        yield lambda t=tile: lora_extended.forward(x, w, bias, three, h=h3, tile=t)
        yield lambda t=tile: lora_extended.input_grad(x, w, one, dh=h, tile=t)
        if tile.fits(arch, x.element_size(), activation=True):
            yield lambda t=tile: lora_extended.forward(x, w, bias, one, "erf", h, t)


def one_pass_launches(x: Tensor, arch: int) -> Iterator[Launch]:
    """The one-pass GEMM in every tile: forward of three groups, and dx at the largest rank."""
    w, bias = x.new_zeros(N, K), x.new_zeros(N)
    for tile in one_pass_candidates(arch, x.element_size()):
        yield lambda t=tile: lora_one_pass.forward(x, w, bias, group(3, 16), t)
        yield lambda t=tile: lora_one_pass.input_grad(x, w, group(1, 64), t)


@pytest.fixture
def kept(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code outlives the run, apart from what programs of this machine keep."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(request.config.cache.mkdir("triton")))


@contextmanager
def fp32_products(precision: str) -> Iterator[None]:
    """Torch's setting, inside."""
    setting = torch.backends.cuda.matmul
    before, setting.fp32_precision = setting.fp32_precision, precision
    try:
        yield
    finally:
        setting.fp32_precision = before


def complaints(kernel: Resources, arch: int, kind: str) -> list[str]:
    """What is wrong with one kernel of one class."""
    wrong = kernel.complaints(shared_bytes(arch))
    if kernel.name in ("_add_slices", "_merge"):  # no products, and fp32 products
        return wrong
    if kind != "fp32" and not kernel.matrix:
        wrong.append(f"{kernel.name}: no matrix instruction")
    if kind == "bf16" and kernel.name in BIG and ARCHS[arch] not in kernel.ptx:
        wrong.append(f"{kernel.name}: {kernel.matrix} is not {ARCHS[arch]}")
    if "cp.async" not in kernel.ptx:
        wrong.append(f"{kernel.name}: loads are not asynchronous")
    return wrong


@pytest.mark.slow
@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kind", CLASSES)
def test_every_configuration_fits(arch, kind, record_property):
    x = torch.zeros(M, K, dtype=CLASSES[kind])
    with fp32_products("tf32" if kind == "tf32" else "ieee"), compiled(arch) as kernels:
        for launch in (*thin_launches(x), *gemm_launches(x, arch), *one_pass_launches(x, arch)):
            launch()
    record_property("kernels", len(kernels))
    assert len(kernels) >= 10
    wrong = [said for kernel in kernels for said in complaints(kernel, arch, kind)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize(
    "tile, why",
    [
        (Tile(128, 128, 64, 4, 4), "bytes of shared memory"),
        (Tile(128, 256, 32, 2, 4), "bytes of spilled registers"),
    ],
)
def test_what_does_not_fit_is_seen(tile, why):
    x, w, adapters = torch.zeros(M, K).half(), torch.zeros(N, K).half(), group(1, 16)
    with compiled(89) as kernels:
        lora_extended.forward(x, w, None, adapters, h=x.new_zeros(M, 16), tile=tile)
    (kernel,) = kernels
    assert why in "".join(kernel.complaints(64 << 10))
