"""The kernels in the tiles that ship, on a GPU: the yardstick, the signal, the same bits twice."""

from dataclasses import replace
from itertools import product

import pytest
import torch

pytest.importorskip("triton")

from fused_lora.kernels.triton import lora_extended, lora_one_pass
from fused_lora.kernels.triton.available import why_not
from fused_lora.kernels.triton.launch import architecture
from fused_lora.kernels.triton.lora_merge import lora_merge
from fused_lora.kernels.triton.tiles import candidates, one_pass_candidates
from fused_lora.reference import philox
from fused_lora.testing.yardstick import error
from fused_lora.types import Span
from tests.kernels.triton.cases import CASES, DTYPES, IDS, Case, adapters, build
from tests.kernels.triton.gain import gain
from tests.kernels.triton.guards import fenced
from tests.kernels.triton.interpreted import test_activation_grads as activation_grads
from tests.kernels.triton.interpreted import test_border as border
from tests.kernels.triton.interpreted import test_dropout as dropout
from tests.kernels.triton.interpreted import test_gelu as gelu
from tests.kernels.triton.interpreted import test_layer_norm as layer_norm
from tests.kernels.triton.interpreted import test_lora_expand as expand
from tests.kernels.triton.interpreted import test_lora_extended_bulk as bulk
from tests.kernels.triton.interpreted import test_lora_merge_many as merges
from tests.kernels.triton.interpreted import test_packed_gradients as packs
from tests.kernels.triton.interpreted import test_row_shrink as row_shrink
from tests.kernels.triton.parity import check, one_pass_run, triton_run
from tests.ops.problems import draw

pytestmark = pytest.mark.gpu

VIT = [
    Case("ViT-B output projection", 8 * 197, 768, 768, (Span(0, 768, 16),)),
    Case("ViT-S fused qkv", 8 * 197, 384, 1152, tuple(
        Span(384 * g, 384 * g + 384, 64) for g in range(3)
    )),
    Case("a rank WeCoLoRA uses", 1024, 768, 3072, (Span(0, 3072, 512),)),
]  # fmt: skip
ALL_IDS = [*IDS, *(case.why for case in VIT)]


@pytest.fixture(autouse=True)
def device():
    """Every tensor of a test is made on the GPU."""
    if said := why_not():
        pytest.skip(said)
    with torch.device("cuda"):
        yield torch.device("cuda", torch.cuda.current_device())


@pytest.mark.parametrize("case", [*CASES, *VIT], ids=ALL_IDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity(case, dtype, monkeypatch):
    with fenced(monkeypatch):
        check(build(case, dtype, torch.float32), dtype, small=False)


@pytest.mark.parametrize("shard", range(4))
def test_parity_on_random_problems(shard):
    for seed in range(shard, 100, 4):
        dtype = DTYPES[seed % 3]
        check(draw(seed, dtype), dtype, small=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_tile_gives_the_same_products(dtype, device):
    p, arch = build(VIT[0], dtype, torch.float32), architecture(device)
    first, *others = candidates(arch, dtype.itemsize, bulk=True, activation=True)
    for tile in others:
        for (name, one), (_, other) in zip(bulk.runs(p, first), bulk.runs(p, tile), strict=True):
            assert error(other, one.double()) <= torch.finfo(dtype).eps, f"{name} in {tile}"
    y = lora_extended.forward(p.x, p.w, p.bias, adapters(p), tile=first).y
    for tile in candidates(arch, dtype.itemsize, bulk=True):
        other = lora_extended.forward(p.x, p.w, p.bias, adapters(p), tile=tile).y
        assert error(other, y.double()) <= torch.finfo(dtype).eps, tile


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_one_pass_tile_gives_the_same_product(dtype, device):
    p = build(VIT[0], dtype, torch.float32)
    for tile in one_pass_candidates(architecture(device), dtype.itemsize):
        y = lora_one_pass.forward(p.x, p.w, p.bias, adapters(p), tile).y
        other = lora_extended.forward(p.x, p.w, p.bias, adapters(p)).y
        assert error(y, other.double()) <= 2 * torch.finfo(dtype).eps, tile


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_and_elements(dtype, monkeypatch):
    layer_norm.test_parity(8 * 197, 768, True, dtype, monkeypatch)
    layer_norm.test_rebuilt_bits_in_a_bordered_buffer(dtype)
    for kind in (("erf", "none"), ("tanh", "tanh")):
        gelu.test_parity(8 * 197, 3072, dtype, *kind, monkeypatch)


@pytest.mark.parametrize("dtype", row_shrink.LOW, ids=str)
@pytest.mark.parametrize("case", row_shrink.FEW, ids=[case.why for case in row_shrink.FEW])
def test_rows_that_form_h(case, dtype, monkeypatch):
    for wide in (False, True):
        row_shrink.test_layer_norm(case, dtype, wide, True, monkeypatch)
    for kind in row_shrink.KINDS:
        row_shrink.test_gelu(case, dtype, kind, monkeypatch)


@pytest.mark.parametrize("dtype", expand.LOW, ids=str)
@pytest.mark.parametrize("case", expand.FEW, ids=[case.why for case in expand.FEW])
def test_terms_that_are_added_later(case, dtype, monkeypatch):
    for wide, around in ((False, True), (True, True), (True, False)):
        expand.test_layer_norm(case, dtype, wide, around, monkeypatch)
        expand.test_residual(case, dtype, wide, around, monkeypatch)


@pytest.mark.parametrize("dtype", row_shrink.LOW, ids=str)
@pytest.mark.parametrize("case", activation_grads.CASES, ids=activation_grads.IDS)
def test_the_derivative_that_forms_gradients(case, dtype):
    large = replace(case, m=8 * case.m, k=3072)
    for kind, each in product(activation_grads.KINDS, (case, large)):
        activation_grads.check(activation_grads.operands(each, dtype), kind, tile=None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_packed(case, dtype, monkeypatch):
    border.test_each_half_is_one_matrix_with_zeros_beside_its_blocks(case, dtype, monkeypatch)
    border.test_w_is_copied_and_each_border_rounded_once(case, dtype, monkeypatch)


@pytest.mark.parametrize("dtype", packs.LOW, ids=str)
@pytest.mark.parametrize("width", [384, 768, 1280])
def test_what_packs_dy_and_forms_gradients(width, dtype):
    """In the tile that ships; small cases in a small one."""
    vit = packs.Case("of a ViT", 8 * 197, width, packs.apart(width, 16, 16, 16))
    packs.check(packs.operands(vit, dtype), tile=None)
    for case in packs.CASES:
        packs.check(packs.operands(case, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout(dtype):
    for case in dropout.CASES:
        dropout.test_parity(case, dtype)
    dropout.test_the_mask_itself()


def test_many_merges():
    for sizes in (merges.ALIGNED, merges.ODD):
        for dtype in DTYPES:
            merges.test_to_nearest(sizes, dtype)
        for dtype in DTYPES[1:]:
            merges.test_stochastic_rounding_has_the_references_bits(sizes, dtype)
    merges.test_blocks_of_the_rows_of_one_matrix_in_place()


@pytest.mark.parametrize("case", VIT, ids=ALL_IDS[len(IDS) :])
def test_same_inputs_same_bits(case):
    p = build(case, torch.bfloat16, torch.float32)
    for run in (triton_run, one_pass_run):
        for (name, once), (_, again) in zip(run(p, False), run(p, False), strict=True):
            assert torch.equal(once, again), name


@pytest.mark.parametrize("kernel", [lora_extended, lora_one_pass], ids=["EXTENDED", "ONE_PASS"])
def test_one_rounding_keeps_the_adapters_signal(kernel):
    assert gain(lambda x, w, group: kernel.forward(x, w, None, group).y, 512, 768, 768) >= 0.99


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_merge_has_the_references_bits(dtype):
    n, k, r, noise = 197, 389, 5, (2**63 + 5, 2**40 + 1)
    w = torch.randn(n, k).to(dtype)
    a, b = (torch.randint(-8, 9, shape) / 8 for shape in ((r, k), (n, r)))
    ours = lora_merge(w, [a], [b], (2.0**-9,), (Span(0, n, r),), noise)
    merged = w.double() + 2.0**-9 * (b.double() @ a.double())
    assert torch.equal(ours, philox.stochastic_round(merged.float(), dtype, *noise))
