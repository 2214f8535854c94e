"""Every shipped configuration on every architecture: what it takes of the chip, without one.

No register spilled, shared memory within the chip's limit, the chip's matrix instruction in the
big product, loads asynchronous, stores of 16 bytes. Compiled code is kept in pytest's cache under
Triton's own key: the sources, the options and the version. bfloat16 stands for float16, which
differs in one letter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fused_lora.kernels.interface import Adapters
from fused_lora.kernels.triton import (
    gelu,
    layer_norm,
    lora_extended,
    lora_grad,
    lora_merge_many,
    lora_one_pass,
    lora_shrink,
    tiles,
)
from fused_lora.kernels.triton.dropout import dropout
from fused_lora.kernels.triton.launch import multiprocessors
from fused_lora.kernels.triton.lora_merge import lora_merge
from fused_lora.kernels.triton.tiles import Tile, candidates, one_pass_candidates, shared_bytes
from fused_lora.types import Span
from tests.kernels.triton.compiler import Resources, compiled

ARCHS = {80: "mma.sync", 89: "mma.sync", 90: "wgmma.", 100: "tcgen05.mma", 120: "mma.sync"}
ON = [*(("bf16", arch) for arch in ARCHS), *(("tf32", arch) for arch in (80, 90, 100))]
ON += [("fp32", arch) for arch in (80, 90, 120)]  # whose code differs little from the others'
CLASSES = {"bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}
WIDE_STORE = re.compile(r"st\.global(\.\w+)*\.v4\.(b|f|u)32")
NO_PRODUCTS = ("_add_slices", "_layer_norm", "_layer_norm_grad", "_gelu_rows")
FP32_PRODUCTS = ("_merge", "_merge_many")
BIG = (
    "_extended",
    "_extended_bulk",
    "_one_pass",
)  # in its own matrix instruction
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
    tall = x.new_zeros(128 * multiprocessors(x.device), K)
    for adapters in (group(1, 16), group(3, 64)):
        h = x.new_zeros(M, adapters.rank)
        yield lambda a=adapters: lora_shrink.shrink(tall, a)
        yield lambda a=adapters: lora_shrink.shrink(x, a)
        yield lambda a=adapters: lora_shrink.shrink_grad(x, a)
        yield lambda a=adapters, h=h: lora_grad.a_grads(h, x, a)
        yield lambda a=adapters: lora_merge(x.new_zeros(N, K), *a)
        if x.dtype is torch.bfloat16:
            yield lambda a=adapters: lora_merge(x.new_zeros(N, K), *a, noise=(1, 2))
    if x.dtype is torch.bfloat16:
        mask, wide, h = dropout(0.1, 1, 2), group(3, 64), x.new_zeros(M, 192)
        yield lambda: lora_shrink.shrink(x, wide, dropout=mask)
        yield lambda: lora_grad.a_grads(h, x, wide, dropout=mask)
        yield lambda: lora_extended.input_grad(x, x.new_zeros(N, K), wide, h, dropout=mask)
        none = x.new_zeros(0, K)
        yield lambda: lora_extended.input_grad(x[:, :0], none, wide, h, dropout=mask)
    w = x.new_zeros(N, K)
    table = lora_merge_many.pack([lora_merge_many.Merge(w, w, torch.zeros(64, K), w[:, :64])])
    yield lambda: lora_merge_many.launch(table, None if x.dtype is torch.float32 else (1, 2))


def gemm_launches(x: Tensor, arch: int) -> Iterator[Launch]:
    """The extended GEMM in every tile: forward, dx, and each of a block's heavy endings."""
    w, bias = x.new_zeros(N, K), x.new_zeros(N)
    one, three = group(1, 16), group(3, 64)
    h, h3 = x.new_zeros(M, 16), x.new_zeros(M, 192)
    forward, input_grad = lora_extended.forward, lora_extended.input_grad
    size = x.element_size()
    for tile in candidates(arch, size, bulk=True):
        yield lambda t=tile: forward(x, w, bias, three, h=h3, tile=t)
        yield lambda t=tile: input_grad(x, w, one, dh=h, tile=t)
    for tile in candidates(arch, size, heavy=True, bulk=True):
        yield lambda t=tile: forward(x, w, bias, one, h=h, tile=t, factor=bias, residual=x)
    wide = {"factor": torch.zeros(N), "residual": torch.zeros(M, N), "out": torch.zeros(M, N)}
    for tile in candidates(arch, size, heavy=True) if size == 2 else ():
        yield lambda t=tile: forward(x, w, bias, one, h=h, tile=t, **wide)
    for tile in candidates(arch, size, bulk=True, activation=True) if size == 2 else ():
        yield lambda t=tile: forward(x, w, bias, one, "erf", h, t)
        yield lambda t=tile: input_grad(x, w, one, h, t, activation="erf", u=x)


def row_launches(x: Tensor) -> Iterator[Launch]:
    """LayerNorm and GELU, forward and backward, at the narrowest and the widest of ViT-S to L."""
    for width in (384, 4096):
        z, v, s = x.new_zeros(M, width), torch.zeros(width), torch.zeros(M)
        yield lambda z=z, v=v: layer_norm.forward(z, v, v, 1e-6)
        yield lambda z=z, v=v, s=s: layer_norm.rebuild(z, v, v, s, s)
        yield lambda z=z, v=v, s=s: layer_norm.input_grad(z, z, v, s, s, z)
    yield lambda: gelu.forward(x)
    yield lambda: gelu.input_grad(x, x)


def one_pass_launches(x: Tensor, arch: int) -> Iterator[Launch]:
    """The one-pass GEMM in every tile: forward of three groups, and dx at the largest rank."""
    w, bias = x.new_zeros(N, K), x.new_zeros(N)
    for tile in one_pass_candidates(arch, x.element_size()):
        yield lambda t=tile: lora_one_pass.forward(x, w, bias, group(3, 16), t)
        yield lambda t=tile: lora_one_pass.input_grad(x, w, group(1, 64), t)


def all_launches(x: Tensor, arch: int) -> Iterator[Launch]:
    """Every kernel; those whose operands differ in width alone once per width."""
    yield from thin_launches(x)
    yield from gemm_launches(x, arch)
    yield from one_pass_launches(x, arch)
    if torch.backends.cuda.matmul.fp32_precision == "ieee":
        yield from row_launches(x)


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
    if kernel.name != "_add_slices" and not WIDE_STORE.search(kernel.ptx):
        wrong.append(f"{kernel.name}: stores are narrower than 16 bytes")
    if kernel.name in NO_PRODUCTS or kernel.name in FP32_PRODUCTS:
        return wrong
    if kind != "fp32" and not kernel.matrix:
        wrong.append(f"{kernel.name}: no matrix instruction")
    if kind == "bf16" and kernel.name in BIG and ARCHS[arch] not in kernel.ptx:
        wrong.append(f"{kernel.name}: {kernel.matrix} is not {ARCHS[arch]}")
    copies = "cp.async.bulk.tensor" if kernel.name == "_extended_bulk" else "cp.async"
    if copies not in kernel.ptx:
        wrong.append(f"{kernel.name}: loads are not asynchronous")
    return wrong


@pytest.mark.slow
@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("kind, arch", ON)
def test_every_configuration_fits(arch, kind, record_property, monkeypatch):
    monkeypatch.setattr(tiles, "architecture", lambda device: arch)
    tiles.thin_tile.cache_clear()
    x = torch.zeros(M, K, dtype=CLASSES[kind])
    with fp32_products("tf32" if kind == "tf32" else "ieee"), compiled(arch) as kernels:
        for launch in all_launches(x, arch):
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
