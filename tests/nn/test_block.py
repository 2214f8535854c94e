"""Fused blocks and MLPs: what their modules compute, in every state a model can be in."""

from __future__ import annotations

import copy
import functools
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import fused_lora
from fused_lora.bench.saved_tensors import SavedBytes
from fused_lora.nn import FusedLoRABlock, FusedLoRAMlp
from fused_lora.nn.block_modules import BLOCKS, FusedModule, kind
from fused_lora.ops.chain.chain import Chain
from fused_lora.ops.operand import RECOMPUTE
from tests.observe import operations
from tests.patching.models import VARIANTS, build, images, wake

each_mode = pytest.mark.parametrize("recompute", RECOMPUTE)


def pair(make=build, recompute="elementwise", dtype=torch.float64, **options):
    """The same patched model at the level of linears and at that of blocks, in training mode."""
    base = make().to(dtype).train()
    fused_lora.patch(base, rank=4, scale=0.5, adapter_dtype=dtype, level="linear", **options)
    wake(base)
    fused = copy.deepcopy(base)
    for block in fused.blocks:
        if kind(block) in BLOCKS:
            FusedLoRABlock.adopt(block, recompute)
    for module in list(fused.modules()):
        if {"fc2", "act"} <= module._modules.keys():
            FusedLoRAMlp.adopt(module, recompute)
    return base, fused


def outcome(model, x, run=None):
    """y and the gradients of all that trains, from one seed."""
    torch.manual_seed(5)
    y = (model if run is None else run)(x)
    trained = [p for p in model.parameters() if p.requires_grad]
    return [y, *torch.autograd.grad(y.double().square().sum(), trained)]


def assert_same(ours, theirs, rtol=1e-9, atol=1e-12):
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=rtol, atol=atol)


@pytest.fixture
def chains(monkeypatch):
    """How often a chain was run: nothing here should pass by falling back."""
    return operations(monkeypatch, Chain)


@each_mode
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_in_float64(name, recompute, chains):
    base, fused = pair(VARIANTS[name], recompute)
    x = images(base)
    assert_same(outcome(fused, x), outcome(base, x))
    halves = 2 * (3 if name == "qk-norm" else 2)
    expected = {"post-norm": 2, "parallel things": 4, "CLIP": halves}.get(name, halves)
    assert len(chains) == expected, "a half fell back to its modules"


@each_mode
def test_drop_path_and_attention_dropout_draw_what_the_modules_draw(recompute, chains):
    base, fused = pair(lambda: build(drop_path_rate=0.4, attn_drop_rate=0.2), recompute)
    x = images(base, 4)
    assert_same(outcome(fused, x), outcome(base, x))
    assert len(chains) == 6


@each_mode
def test_dropout_of_adapters_draws_what_the_linears_draw(recompute, chains):
    base, fused = pair(lambda: build(drop_path_rate=0.4), recompute, dropout=0.5)
    x = images(base, 4)
    assert_same(outcome(fused, x), outcome(base, x))
    assert len(chains) == 4, "a half fell back to its modules"


@each_mode
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_model_in_16_bits_with_adapters_in_fp32(recompute, dtype, chains):
    model = build().to(dtype).train()
    fused_lora.patch(model, rank=4, recompute=recompute)
    wake(model)(images(model)).float().sum().backward()
    assert len(chains) == 4, "a half fell back to its modules"


@each_mode
def test_without_flash_attention(recompute, chains):
    base, fused = pair(recompute=recompute)
    x = images(base)
    with sdpa_kernel(SDPBackend.MATH):
        assert_same(outcome(fused, x), outcome(base, x))
    assert chains


@each_mode
def test_one_block_with_a_mask(recompute):
    base, fused = pair(recompute=recompute)
    x = torch.randn(2, 17, 48, dtype=torch.float64)
    mask = torch.rand(2, 1, 17, 17) > 0.3
    for call in ({"attn_mask": mask | torch.eye(17).bool()}, {"is_causal": True}):
        both = (model.blocks[1] for model in (fused, base))
        assert_same(*[outcome(block, x, functools.partial(block, **call)) for block in both])


class TestFallsBack:
    """To its modules, with the same result, whenever something would be lost."""

    def check(self, base, fused, chains, expected):
        x = images(base)
        assert_same(outcome(fused, x), outcome(base, x))
        assert len(chains) == expected

    def test_dropout_in_the_mlp_and_behind_the_attention(self, chains):
        self.check(*pair(lambda: build(proj_drop_rate=0.2)), chains, 0)

    def test_a_layer_scale_that_trains(self, chains):
        self.check(*pair(VARIANTS["LayerScale"], trainable="ls2"), chains, 4)

    def test_a_norm_that_trains_is_fused_all_the_same(self, chains):
        self.check(*pair(trainable=["norm1", "bias"]), chains, 4)

    def test_one_projection_without_adapters(self, chains):
        self.check(*pair(targets=["q", "v", "fc1", "fc2"]), chains, 2)

    def test_merged(self, chains):
        base, fused = pair()
        for model in (base, fused):
            fused_lora.merge(model.eval())
        x = images(base)
        torch.testing.assert_close(fused(x), base(x))
        assert not chains

    def test_disabled(self, chains):
        base, fused = pair()
        x = images(base)
        with fused_lora.disable(base), fused_lora.disable(fused):
            torch.testing.assert_close(fused(x), base(x))
        assert not chains
        self.check(base, fused, chains, 4)

    @pytest.mark.parametrize("where", ["mlp.act", "attn.qkv", "norm1", "attn", "mlp"])
    @pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
    def test_hooks_on_children(self, where, kind):
        _, fused = pair()
        seen = []
        module = fused.blocks[1].get_submodule(where)
        getattr(module, f"register_{kind}_hook")(lambda *_: seen.append(1) and None)
        outcome(fused, images(fused))
        assert seen

    def test_a_forward_of_its_own(self):
        _, fused = pair()
        act = fused.blocks[0].mlp.act
        act.forward = lambda u: u.relu()
        y = fused(images(fused))
        del act.forward
        assert not torch.allclose(y, fused(images(fused)))

    @pytest.mark.parametrize("replace", ["mlp.act", "norm2", "mlp.fc1", "attn.proj"])
    def test_children_replaced_by_others(self, replace):
        base, fused = pair()
        others = {"norm2": nn.LayerNorm(48, eps=0.5), "mlp.act": nn.Tanh()}
        other = others.get(replace, nn.Linear(48, 192 if replace == "mlp.fc1" else 48)).double()
        for model in (base, fused):
            parent, _, leaf = f"blocks.0.{replace}".rpartition(".")
            setattr(model.get_submodule(parent), leaf, other)
        x = images(base)
        assert_same(outcome(fused, x), outcome(base, x))

    def test_without_gradients(self, chains):
        base, fused = pair()
        x = images(base)
        with torch.no_grad():
            torch.testing.assert_close(fused(x), base(x))
        with torch.inference_mode():
            torch.testing.assert_close(fused(x), base(x))
        assert len(chains) == 8

    def test_a_dtype_that_does_not_fit_fails_as_the_modules_do(self):
        _, fused = pair(dtype=torch.float32)
        with pytest.raises((TypeError, RuntimeError), match=r"float|dtype"):
            fused.blocks[0](torch.randn(1, 17, 48, dtype=torch.bfloat16))

    def test_an_empty_batch(self):
        _, fused = pair()
        assert fused.blocks[0](torch.zeros(0, 17, 48, dtype=torch.float64)).shape == (0, 17, 48)


@each_mode
@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_checkpoint(recompute, reentrant, chains):
    base, fused = pair(lambda: build(drop_path_rate=0.4), recompute)

    def run(model):
        def forward(x):
            x = model.patch_embed(x).requires_grad_()
            for block in model.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return x

        return forward

    def grads(model):
        model.zero_grad()
        torch.manual_seed(7)
        run(model)(images_once).square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    images_once = images(base)
    assert_same(grads(fused), grads(base))
    assert chains


@each_mode
def test_gradients_accumulate(recompute):
    base, fused = pair(recompute=recompute)
    x = images(base, 4)
    for model in (base, fused):
        for part in x.split(1):
            model(part).square().sum().backward()
    trained = [[p.grad for p in m.parameters() if p.requires_grad] for m in (fused, base)]
    assert_same(*trained)


@each_mode
def test_autocast(recompute, chains):
    base, fused = pair(VARIANTS["LayerScale"], recompute, torch.float32)
    x = images(base)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(outcome(fused, x), outcome(base, x), rtol=0.05, atol=0.05)
    assert chains


def test_two_models_share_a_block():
    _, fused = pair()
    other = build().double().train()
    other.blocks[1] = fused.blocks[1]
    x = images(other)
    (other(x).square().sum() + fused(x).square().sum()).backward()
    twice = fused.blocks[1].mlp.fc1.lora_B.grad.clone()
    fused.zero_grad()
    other(x).square().sum().backward()
    once = fused.blocks[1].mlp.fc1.lora_B.grad.clone()
    fused.zero_grad()
    fused(x).square().sum().backward()
    torch.testing.assert_close(twice, once + fused.blocks[1].mlp.fc1.lora_B.grad)


class TestIdentity:
    def test_is_still_what_it_was(self):
        base, fused = pair()
        block, plain = fused.blocks[0], base.blocks[0]
        assert isinstance(block, type(plain)) and isinstance(block.mlp, type(plain.mlp))
        assert isinstance(block, FusedLoRABlock) and isinstance(block.mlp, FusedLoRAMlp)
        assert type(block).__name__ == "FusedLoRABlock" and block.state_dict().keys()
        assert fused.state_dict().keys() == base.state_dict().keys()

    @pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
    def test_copies(self, how):
        _, fused = pair(recompute="gemm")
        if how == "deepcopy":
            twin = copy.deepcopy(fused)
        elif how == "pickle":
            twin = pickle.loads(pickle.dumps(fused))
        else:
            file = io.BytesIO()
            torch.save(fused, file)
            file.seek(0)
            twin = torch.load(file, weights_only=False)
        assert type(twin.blocks[0]) is type(fused.blocks[0])
        assert twin.blocks[0].recompute == "gemm"
        x = images(fused)
        assert_same(outcome(twin, x), outcome(fused, x))
        assert twin.blocks[0].mlp.fc1.weight is not fused.blocks[0].mlp.fc1.weight

    def test_release(self):
        base, fused = pair()
        for module in list(fused.modules()):
            if isinstance(module, FusedModule):
                module.release()
        kinds = [[type(m) for m in model.modules()] for model in (base, fused)]
        assert kinds[0] == kinds[1]
        assert fused.blocks[0].__dict__.keys() == base.blocks[0].__dict__.keys()

    def test_twice_is_refused(self):
        _, fused = pair()
        with pytest.raises(TypeError, match="FusedLoRABlock is fused already"):
            FusedLoRABlock.adopt(fused.blocks[0])

    def test_only_classes_whose_forward_is_known(self):
        stranger = VARIANTS["post-norm"]().blocks[0]
        with pytest.raises(TypeError, match="ResPostBlock.* is not one of .*Block"):
            FusedLoRABlock.adopt(stranger)
        with pytest.raises(TypeError, match="Sequential is not one of .*Mlp"):
            FusedLoRAMlp.adopt(nn.Sequential())
        assert not isinstance(stranger, FusedModule)

    def test_modes_are_checked(self):
        base, fused = pair()
        with pytest.raises(ValueError, match="recompute must be one of .*, got 'all'"):
            fused.blocks[0].recompute = "all"
        with pytest.raises(ValueError, match="recompute must be one of .*, got 'all'"):
            FusedLoRABlock.adopt(base.blocks[0], "all")
        assert not isinstance(base.blocks[0], FusedModule)

    def test_one_layer_can_be_told_otherwise(self):
        base, fused = pair()
        fused.blocks[1].recompute = "gemm"
        kept = []
        for block in fused.blocks:
            x = torch.randn(2, 17, 48, dtype=torch.float64, requires_grad=True)
            with SavedBytes(fused, [x]) as saved:
                block(x)
            kept.append(saved.total)
        assert kept[1] < kept[0] / 2


def test_compiles_whole_from_its_modules():
    torch._dynamo.reset()
    _, fused = pair(dtype=torch.float32)
    x = images(fused)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    assert_same(outcome(fused, x, compiled), outcome(fused, x), rtol=1e-4, atol=1e-5)
