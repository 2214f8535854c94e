"""Each kernel once, in a small case with tails: what a judge of memory and of races runs.

`make test-semantics` runs these by ttsem, which executes what Triton compiles on a CPU and fails at
the kernel's line where an access leaves its tensor, two programs race, or a result is undefined.
Outputs have no fences here, so that what is written beside them is written beside a tensor. On a
GPU they are a quick look at every kernel.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

from fused_lora.kernels import triton as room
from fused_lora.kernels.interface import Adapters
from fused_lora.kernels.triton import (
    border,
    elementwise,
    lora_expand,
    lora_extended,
    lora_grad,
    lora_grad_rank,
    lora_linear_fp8,
    lora_one_pass,
    lora_shrink,
)
from fused_lora.kernels.triton import lora_merge as merging
from fused_lora.kernels.triton.available import why_not
from fused_lora.kernels.triton.lora_merge import Merge, lora_merge
from fused_lora.kernels.triton.tiles import DerivativeTile, ElementTile, MergeTile, Tile
from fused_lora.reference import lora_linear_fp8 as reference_fp8
from fused_lora.reference import lora_merge as reference_merge
from fused_lora.testing.yardstick import error
from fused_lora.types import Span
from tests.kernels.triton.cases import BULK_TILE, THIN_TILE, TILE, Case, adapters, build
from tests.kernels.triton.interpreted import test_dropout as dropout
from tests.kernels.triton.interpreted import test_lora_extended_fp8 as fp8
from tests.kernels.triton.interpreter import ASSEMBLY
from tests.kernels.triton.parity import check

TAILS = Case("tails everywhere, two adapters", 37, 43, 50, (Span(0, 21, 5), Span(21, 50, 3)))
WHOLE_TILES = Case("tails of rows alone", 37, 128, 64, (Span(0, 64, 5),))
SLOPE_TILE = Tile(32, 64, 32, 2, 4)
DERIVATIVE_TILES = [DerivativeTile(32, 64, shares, 2, 4) for shares in (1, 4)]
WHOLE_ROWS = Case("tails, rows that descriptors take", 37, 40, 56, (Span(0, 56, 5),))
CASES: dict[str, Callable[[pytest.MonkeyPatch], object]] = {}


def case_of(*kernels: str) -> Callable[..., Callable[[pytest.MonkeyPatch], object]]:
    """The case that launches ``kernels``."""

    def add(run: Callable[[pytest.MonkeyPatch], object]) -> Callable[..., object]:
        CASES[" ".join(kernels)] = run
        return run

    return add


@case_of("_pack", "_shrink", "_extended", "_one_pass", "_partial_sums", "_add_slices")
def _(monkeypatch):
    check(build(TAILS, torch.bfloat16, torch.float32), torch.bfloat16)


@case_of("_extended_bulk")
def _(monkeypatch):
    p = build(WHOLE_ROWS, torch.float16, torch.float32)
    group, u = adapters(p), p.x.flip(0).contiguous()
    for tile in (TILE, BULK_TILE):
        ends = {"factor": p.w[:, 0].contiguous(), "residual": p.dy}
        y = lora_extended.forward(p.x, p.w, p.bias, group, "erf", tile=tile, **ends).y
        du, _ = lora_extended.input_grad(p.dy, p.w, group, tile=tile, activation="tanh", u=u)
        if tile is TILE:
            expected = y, du
    for found, other in zip((y, du), expected, strict=True):
        assert error(found, other.double()) <= torch.finfo(torch.float16).eps


@case_of("_one_pass")
def _(monkeypatch):
    p = build(TAILS, torch.bfloat16, torch.float32)
    group, wide = adapters(p), torch.randn(TAILS.m, TAILS.n)
    how = {"factor": p.w[:, 0].contiguous(), "residual": wide, "out": torch.empty_like(wide)}
    y = lora_one_pass.forward(p.x, p.w, p.bias, group, TILE, **how).y
    plain = lora_one_pass.forward(p.x, p.w, p.bias, group, TILE).y
    truth = wide.double() + p.w[:, 0].double() * plain.double()
    assert error(y, truth) <= torch.finfo(torch.bfloat16).eps
    dx, _ = lora_one_pass.input_grad(p.dy, p.w, group, TILE, residual=p.x)
    truth = p.x.double() + lora_one_pass.input_grad(p.dy, p.w, group, TILE)[0].double()
    assert error(dx, truth) <= 2 * torch.finfo(torch.bfloat16).eps


@case_of("_extended_grads")
def _(monkeypatch):
    p = build(WHOLE_TILES, torch.bfloat16, torch.float32)
    group, (m, k) = adapters(p), p.x.shape
    monkeypatch.setattr(lora_grad_rank, "multiprocessors", lambda _: 4)  # of two blocks, two slices
    dh, h = torch.randn(m, 5).to(p.x.dtype), torch.randn(m, 3).to(p.x.dtype)
    given = (p.dy, p.w, group, dh, "erf", p.x, h, SLOPE_TILE)
    made = lora_grad.input_grad_and_slices(*given)
    du, sums = made.du, (made.a, made.b)
    plain, _ = lora_extended.input_grad(p.dy, p.w, group, dh, SLOPE_TILE, activation="erf", u=p.x)
    assert error(du, plain.double()) <= torch.finfo(torch.bfloat16).eps
    x = torch.nn.functional.gelu(p.x.double()).to(p.x.dtype)
    for found, one, other in zip(sums, (x, du), (dh, h), strict=True):
        assert found.shape == (2, k, 16)
        truth = one.double().T @ other.double()
        assert error(found.sum(0)[:, : other.shape[1]], truth) <= 1e-2


@case_of("_activation_grads", "_add_blocks")
def _(monkeypatch):
    p = build(WHOLE_TILES, torch.bfloat16, torch.float32)
    monkeypatch.setattr(lora_grad_rank, "multiprocessors", lambda _: 4)  # of two blocks, two slices
    u, dtype = p.x, p.x.dtype
    dg, dh, h = (torch.randn(37, size).to(dtype) for size in (128, 5, 3))
    spans = [Span(0, 41, 1), Span(41, 128, 2)]
    b = [torch.randn(41, 1), torch.randn(87, 2)]
    before = Adapters([torch.randn(1, 8), torch.randn(2, 8)], b, [0.5, 2.0], spans)
    given = (dg, adapters(p), dh, "erf", u, h, before)
    each = [lora_grad.activation_grad_and_slices(*given, tile) for tile in DERIVATIVE_TILES]
    made = each[0]
    torch.testing.assert_close(each[1].hidden, made.hidden)
    dx = dg.double() + dh.double() @ torch.cat(p.a).to(dtype).double()
    truth = torch.ops.aten.gelu_backward(dx, u.double())
    assert error(made.du, truth) <= torch.finfo(dtype).eps
    x = torch.nn.functional.gelu(u.double()).to(dtype)
    for found, one, other in ((made.a, x, dh), (made.b, made.du, h)):
        assert found.shape == (2, 128, 16)
        truth = one.double().T @ other.double()
        assert error(found.sum(0)[:, : other.shape[1]], truth) <= 1e-2
    parts = zip(b, before.scales, spans, strict=True)
    wide = made.du.double()
    truth = [s * wide[:, c.start : c.stop] @ b_g.to(dtype).double() for b_g, s, c in parts]
    dh_before = lora_grad.add_blocks(made.hidden, before, dtype)
    assert error(dh_before, torch.cat(truth, 1)) <= torch.finfo(dtype).eps


@case_of("_pack_grads", "_add_blocks")
def _(monkeypatch):
    monkeypatch.setattr(lora_grad_rank, "multiprocessors", lambda device: 4)
    dtype, tile = torch.bfloat16, ElementTile(32, 64, 2, 4)
    spans = [Span(0, 64, 5), Span(128, 192, 3)]  # of the first and the last part
    b = [torch.randn(64, s.rank) for s in spans]
    before = Adapters([torch.randn(s.rank, 8) for s in spans], b, [0.5, 2.0], spans)
    parts = [torch.randn(37, 64 + 8 * p).to(dtype)[:, :64] for p in range(3)]
    h = torch.randn(37, 8).to(dtype)
    made = lora_grad_rank.pack_and_slices(parts, h, before, tile)
    assert torch.equal(made.dy, torch.cat(parts, 1))
    dh = lora_grad.add_blocks(made.hidden, before, dtype, columns=192)
    wide = made.dy.double()
    for g, own, ranks in before.ranks():
        truth = before.scales[g] * wide[:, own] @ b[g].to(dtype).double()
        assert error(dh[:, ranks], truth) <= torch.finfo(dtype).eps
        truth = wide[:, own].T @ h[:, ranks].double()
        assert error(made.b.sum(0)[own, ranks], truth) <= 1e-5


@case_of("_quantise", "_extended_fp8")
def _(monkeypatch):
    p = build(TAILS, torch.bfloat16, torch.float32)
    w, x = reference_fp8.quantise(p.w), lora_linear_fp8.quantise(p.x)
    assert fp8.same(x, reference_fp8.quantise(p.x))
    h = lora_shrink.shrink(p.x, adapters(p), tile=THIN_TILE)
    y = lora_linear_fp8.forward_extended_fp8(x, w, p.bias, adapters(p), h, TILE)
    assert error(y, fp8.equation(p.double())) <= 4 * torch.finfo(torch.bfloat16).eps


@case_of("_layer_norm", "_layer_norm_grad")
def _(monkeypatch):
    x, dy = torch.randn(37, 71), torch.randn(37, 71)
    weight, bias = torch.randn(71), torch.randn(71)
    y, mean, rstd = elementwise.layer_norm_forward(x, weight, bias, 1e-6)
    truth = torch.nn.functional.layer_norm(x, (71,), weight, bias, 1e-6)
    torch.testing.assert_close(y, truth, rtol=1e-5, atol=1e-5)
    assert torch.equal(elementwise.layer_norm_rebuild(x, weight, bias, mean, rstd), y)
    dx = elementwise.layer_norm_input_grad(dy, x, weight, mean, rstd, dy)
    leaf = x.clone().requires_grad_()
    torch.nn.functional.layer_norm(leaf, (71,), weight, bias, 1e-6).backward(dy)
    torch.testing.assert_close(dx, leaf.grad + dy, rtol=1e-4, atol=1e-5)


@case_of("_gelu_rows")
def _(monkeypatch):
    u, dy, tile = torch.randn(7, 71), torch.randn(7, 71), ElementTile(4, 32)
    for kind, approximate in (("erf", "none"), ("tanh", "tanh")):
        leaf = u.clone().requires_grad_()
        truth = torch.nn.functional.gelu(leaf, approximate=approximate)
        truth.backward(dy)
        torch.testing.assert_close(elementwise.gelu_forward(u, kind, tile=tile), truth.detach())
        torch.testing.assert_close(elementwise.gelu_input_grad(dy, u, kind, tile=tile), leaf.grad)


@case_of("_row_shrink")
def _(monkeypatch):
    p = build(TAILS, torch.bfloat16, torch.float32)
    a = torch.cat(p.a).double()
    weight, bias = torch.randn(43), torch.randn(43)
    whole = torch.empty(37, 43 + a.shape[0], dtype=torch.bfloat16)
    left, right = whole[:, :43], whole[:, 43:]
    given = (adapters(p), left, right, THIN_TILE)
    both, pieces = border.packing([adapters(p)] * 2, p.x.dtype)
    assert pieces is not None
    n, *_ = lora_shrink.layer_norm_shrink(p.x, weight, bias, 1e-6, *given, pieces)
    apart = border.packed_together([adapters(p)] * 2, p.x.dtype)
    assert all(torch.equal(x, y) for x, y in zip(both[1][:2], apart[1][:2], strict=True))
    truth = torch.nn.functional.layer_norm(p.x.float(), (43,), weight, bias, 1e-6)
    assert error(n, truth.double()) <= torch.finfo(torch.bfloat16).eps
    assert error(right, n.double() @ a.T) <= 2 * torch.finfo(torch.bfloat16).eps
    g, h = lora_shrink.gelu_shrink(p.x, "erf", *given)
    assert error(g, torch.nn.functional.gelu(p.x.double())) <= torch.finfo(torch.bfloat16).eps
    assert error(h, g.double() @ a.T) <= 2 * torch.finfo(torch.bfloat16).eps


@case_of("_norm_expand", "_residual_expand")
def _(monkeypatch):
    p = build(TAILS, torch.bfloat16, torch.float32)
    a, weight = torch.cat(p.a).double(), torch.randn(43)
    h, residual, factor = torch.randn(37, 8).to(p.x.dtype), torch.randn(37, 43), torch.randn(50)
    average, inverse = p.x.float().mean(1), (p.x.float().var(1, correction=0) + 1e-6).rsqrt()
    given = (p.x.flip(0), p.x, weight, average, inverse, h, adapters(p), residual)
    dx = lora_expand.layer_norm_expand(*given, torch.empty_like(residual), THIN_TILE)
    leaf = p.x.double().requires_grad_()
    n = torch.nn.functional.layer_norm(leaf, (43,), weight.double(), None, 1e-6)
    n.backward(p.x.flip(0).double() + h.double() @ a)
    eps = torch.finfo(torch.bfloat16).eps
    assert error(dx, leaf.grad + residual) <= eps
    term = torch.zeros(37, 50, dtype=torch.float64)
    for g, columns, ranks in adapters(p).ranks():
        term[:, columns] += p.scales[g] * h[:, ranks].double() @ p.b[g].double().T
    z, joined = p.dy.clone(), p.dy.flip(1)
    y = lora_expand.residual_expand(z, h, adapters(p), joined, factor, z, THIN_TILE)
    assert y is z
    assert error(y, joined.double() + factor.double() * (p.dy.double() + term)) <= eps


@case_of("_merge")
def _(monkeypatch):
    p = build(TAILS, torch.bfloat16, torch.float32)
    truth = p.w.double()
    for a, b, s, span in zip(*adapters(p), strict=True):
        truth[span.start : span.stop] += s * b.double() @ a.double()
    for noise in (None, (7, 3)):
        merged = lora_merge(p.w, *adapters(p), noise=noise, tile=MergeTile(32, 32))
        assert error(merged, truth) <= torch.finfo(torch.bfloat16).eps


@case_of("_border_weight")
def _(monkeypatch):
    p = build(TAILS, torch.bfloat16, torch.float32)
    right = torch.zeros(50, 8)
    for g, columns, ranks in adapters(p).ranks():
        right[columns, ranks] = p.b[g] * p.scales[g]
    for w in (p.w, p.w.t().contiguous().t()):
        found = merging.bordered_weight(w, adapters(p))
        assert torch.equal(found, torch.cat((w, right.to(w.dtype)), 1))
        found = merging.bordered_weight_rows(w, adapters(p))
        assert torch.equal(found, torch.cat((w, *(a.to(w.dtype) for a in p.a))))


@case_of("_merge_many")
def _(monkeypatch):
    merges = []
    for n, k, r in ((37, 43, 5), (33, 20, 20), (3, 1, 1)):
        w, a, b = torch.randn(n, k), torch.randn(r, k), torch.randn(n, r)
        merges.append(Merge(w, torch.full_like(w, torch.nan), a, b, 0.5))
    table = merging.pack(merges, MergeTile(32, 32))
    tell_of(monkeypatch, [t for m in merges for t in (m.w, m.out, m.a, m.b)])
    merging.launch_many(table)
    for m in merges:
        truth = reference_merge.merge(m.w, m.a, m.b, m.scale)
        torch.testing.assert_close(m.out, truth, rtol=1e-5, atol=1e-5)


@case_of("_shrink", "_extended", "_partial_sums")
def with_dropout(monkeypatch):
    dropout.test_parity(dropout.CASES[0], torch.float32)


def tell_of(monkeypatch: pytest.MonkeyPatch, tensors: list[Tensor]) -> None:
    """Show ttsem the tensors that a table of addresses leads to: it knows those of arguments."""
    memory = sys.modules.get("ttsem.memory")
    if memory is None:
        return
    right = memory.Memory.__init__

    def init(self: object) -> None:
        right(self)
        for tensor in tensors:
            flat = torch.empty(0, dtype=torch.uint8)
            storage = flat.set_(tensor.untyped_storage())
            self.register(storage.data_ptr(), storage.numpy())  # type: ignore[attr-defined]

    monkeypatch.setattr(memory.Memory, "__init__", init)


def tell_of_assembly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Show ttsem what the assembly in these kernels means, within a unit in the last place."""
    operations = sys.modules.get("ttsem.ops")
    if operations is None:
        return
    for text, meaning in ASSEMBLY.items():
        run = lambda *values, f=meaning: [f(*(np.asarray(v, np.float32) for v in values))]  # noqa: E731
        monkeypatch.setitem(operations.PTX_FRAGMENTS, text, (run, "div"))


def kernels() -> set[str]:
    """Every kernel that is launched: Triton functions that no other one calls."""
    functions = {}
    for module in pkgutil.iter_modules(room.__path__):
        for name, value in vars(importlib.import_module(f"{room.__name__}.{module.name}")).items():
            if isinstance(value, JITFunction):
                functions[name] = value
    bodies = [function.src.partition("(")[2] for function in functions.values()]
    return {name for name in functions if not any(re.search(rf"\b{name}\(", b) for b in bodies)}


def test_every_kernel_has_a_case():
    assert kernels() == {name for names in CASES for name in names.split()}


@pytest.mark.gpu
@pytest.mark.parametrize("names", CASES)
def test_it_stays_in_its_tensors(names, monkeypatch):
    if said := why_not():
        pytest.skip(said)
    launched: set[str] = set()
    right = JITFunction.run

    def run(self: JITFunction, *args: object, **kwargs: object) -> object:
        launched.add(self.__name__)
        return right(self, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "run", run)
    tell_of_assembly(monkeypatch)
    with torch.device("cuda"):
        CASES[names](monkeypatch)
    assert launched >= set(names.split())
