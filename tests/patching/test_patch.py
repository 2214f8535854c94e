"""patch and unpatch on real models: what is hit, what trains, what comes back."""

import copy
import functools
import pickle
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fused_lora
from fused_lora.nn import AdaptedLinear
from fused_lora.patching.patch import RECORD
from fused_lora.patching.rules import find
from fused_lora.testing.families import of_others, of_timm
from tests.patching.models import VARIANTS, build, images, wake

every_variant = pytest.mark.parametrize("make", VARIANTS.values(), ids=VARIANTS)


def naive(linear: AdaptedLinear):
    """The module's mathematics in plain torch, as a hook's replacement of its output."""

    def hook(module, inputs, _):
        (x,) = inputs
        y = F.linear(x, module.weight, module.bias)
        pairs = zip(module.adapters(), module.scales, module.groups.values(), strict=True)
        pieces = [
            F.pad(s * F.linear(F.linear(x, a), b), (span.start, y.shape[-1] - span.stop))
            for (a, b), s, span in pairs
        ]
        return y + sum(pieces)

    return linear.register_forward_hook(hook)


@every_variant
def test_patch_hits_all_six_roles_of_every_block_and_nothing_else(make):
    model = make()
    report = fused_lora.patch(model, rank=4)
    roles = {role for row in report.rows for role in row.role.split("|")}
    assert roles == {"q", "k", "v", "out", "fc1", "fc2"}
    names = [row.module for row in report.rows]
    assert all(name.startswith("blocks.") for name in names)
    blocks = len(model.blocks)
    assert len(names) % blocks == 0
    assert len(names) >= 4 * blocks


@every_variant
def test_an_untrained_patch_changes_nothing_and_unpatch_restores_every_bit(make):
    model = make()
    x = images(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    kinds = {name: type(m) for name, m in model.named_modules()}
    y = model(x)
    fused_lora.patch(model, rank=4)
    torch.testing.assert_close(model(x), y)
    wake(model)
    assert not torch.allclose(model(x), y)
    fused_lora.unpatch(model)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trains
    assert {name: type(m) for name, m in model.named_modules()} == kinds
    assert torch.equal(model(x), y)


@every_variant
@pytest.mark.parametrize("qkv", ["separate", "joint"])
def test_gradients_equal_those_of_naive_lora_in_float64(make, qkv):
    model = make().double()
    fused_lora.patch(model, rank=4, qkv=qkv, scale=0.5, adapter_dtype=torch.float64)
    wake(model)
    x = images(model)
    adapters = [p for p in model.parameters() if p.requires_grad]
    ours = torch.autograd.grad(model(x).square().sum(), adapters)
    hooks = [naive(m) for m in model.modules() if isinstance(m, AdaptedLinear)]
    theirs = torch.autograd.grad(model(x).square().sum(), adapters)
    [hook.remove() for hook in hooks]
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


def test_only_adapters_train_and_the_head_on_request():
    model = build()
    report = fused_lora.patch(model, rank=4, trainable=["^head"])
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trains if "lora_" not in name} == {"head.weight", "head.bias"}
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_a_training_run_learns():
    torch.manual_seed(1)
    model = build()
    fused_lora.patch(model, rank=4, trainable="^head")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x, labels = images(model, 16), torch.arange(16) % 10
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


class TestTargets:
    def test_a_subset_of_q_k_v(self):
        model = build()
        report = fused_lora.patch(model, rank=4, targets=["q", "v"])
        assert [row.module for row in report.rows] == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
        assert list(model.blocks[0].attn.qkv.groups) == ["q", "v"]
        assert report.rows[0].ranks == (4, 4)

    def test_joint(self):
        model = build()
        fused_lora.patch(model, rank=4, qkv="joint", targets=("q", "k", "v"))
        assert model.blocks[0].attn.qkv.lora_A.shape == (4, 48)
        assert model.blocks[0].attn.qkv.lora_B.shape == (144, 4)

    def test_patterns(self):
        model = build()
        fused_lora.patch(
            model,
            rank=4,
            rank_pattern={"fc1": 8, "v": 2, r"blocks\.1\.mlp": 3},
            alpha_pattern={"out": 2.0},
        )
        assert model.blocks[0].mlp.fc1.adapter()[0].shape[0] == 8
        assert model.blocks[1].mlp.fc1.adapter()[0].shape[0] == 3
        assert model.blocks[0].attn.qkv.groups["v"].rank == 2
        assert model.blocks[0].attn.proj.scales == (0.5,)
        assert model.blocks[0].mlp.fc2.scales == (1.0,)

    def test_patch_embedding_head_and_pool_are_never_found(self):
        model = VARIANTS["attention pool"]()
        assert not any("attn_pool" in f.name or "patch_embed" in f.name for f in find(model))

    def test_a_single_block_can_be_patched(self):
        block = build().blocks[0]
        report = fused_lora.patch(block, rank=4, example_input=torch.randn(1, 17, 48))
        assert len(report.rows) == 4

    def test_seed(self):
        first, second = build(), build()
        [fused_lora.patch(model, rank=4, seed=5) for model in (first, second)]
        for p, q in zip(first.parameters(), second.parameters(), strict=True):
            if p.requires_grad:
                assert torch.equal(p, q)


def test_the_report_is_a_table():
    model = build()
    text = str(fused_lora.patch(model, rank=4, batch_size=8))
    assert "blocks.0.attn.qkv" in text
    assert "q|k|v" in text
    assert "4|4|4" in text
    assert "[144, 48]" in text
    assert "8 linears adapted" in text
    assert "batch 8 on cpu" in text


class TestUnpatch:
    @pytest.mark.parametrize(
        "wrap", [nn.Sequential, functools.partial(torch.compile, backend="eager")]
    )
    def test_through_a_wrapper(self, wrap):
        model = build()
        fused_lora.patch(model, rank=4)
        wrapped = wrap(model)
        assert "M 136  K 48" in fused_lora.explain(wrapped, batch_size=8)
        fused_lora.unpatch(wrapped)
        assert all(p.requires_grad for p in model.parameters())
        assert RECORD not in model.__dict__

    def test_after_the_head_was_replaced(self):
        model = build()
        fused_lora.patch(model, rank=4)
        model.reset_classifier(0)
        fused_lora.unpatch(model)
        assert all(p.requires_grad for p in model.parameters())

    def test_with_the_adapters_merged_in_everything_trains_again(self):
        model = build()
        fused_lora.patch(model, rank=4, trainable=["qkv.weight"])
        fused_lora.unpatch(model, merge=True)
        assert all(p.requires_grad for p in model.parameters())


class TestTrialForward:
    def test_random_streams_go_on_as_if_nothing_had_been_drawn(self):
        model = build(drop_path_rate=0.3, patch_drop_rate=0.5, proj_drop_rate=0.1).train()
        before = torch.get_rng_state()
        fused_lora.patch(model, rank=4, seed=1)
        assert torch.equal(before, torch.get_rng_state())
        assert model.training

    def test_what_a_forward_caches_is_not_left_on_meta(self):
        class Caching(nn.Module):
            def __init__(self):
                super().__init__()
                self.model, self.gain, self.calls = build(), None, 0
                self.norm = nn.BatchNorm2d(3)

            def forward(self, x):
                self.calls += 1
                if self.gain is None:
                    self.gain = torch.ones(1, device=x.device)
                    self.register_buffer("mask", torch.ones(1, device=x.device))
                return self.model(self.norm(x) * self.gain)

        model = Caching().train()
        fused_lora.patch(model, rank=4, example_input=torch.randn(1, 3, 32, 32))
        assert (model.gain, model.calls, hasattr(model, "mask")) == (None, 0, False)
        assert model.norm.num_batches_tracked == 0
        model(torch.randn(2, 3, 32, 32)).sum().backward()

    def test_as_many_channels_as_the_patch_embedding_takes(self):
        assert fused_lora.patch(build(in_chans=1), rank=4).rows


def test_deepcopy_and_pickle_of_a_patched_model():
    model = build()
    fused_lora.patch(model, rank=4)
    wake(model)
    x = images(model)
    y = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), y)
        fused_lora.unpatch(twin)
        assert all(p.requires_grad for p in twin.parameters())
    assert torch.equal(model(x), y)


def test_vanilla_checkpoint_loads_strictly_into_a_patched_model():
    donor, model = build(), build()
    fused_lora.patch(model, rank=4)
    model.load_state_dict(donor.state_dict(), strict=True)
    x = images(model)
    torch.testing.assert_close(model(x), donor(x))


class TestMerge:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_merge_then_unmerge_restores_every_bit(self, dtype):
        model = build().to(dtype)
        fused_lora.patch(model, rank=4)
        wake(model)
        state = {key: value.clone() for key, value in model.state_dict().items()}
        x = images(model)
        y = model(x)
        fused_lora.merge(model)
        torch.testing.assert_close(model(x), y, rtol=0.1, atol=0.1 if dtype.itemsize == 2 else 1e-4)
        fused_lora.unmerge(model)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert torch.equal(model(x), y)

    def test_unpatch_can_keep_what_was_learned(self):
        model = build()
        fused_lora.patch(model, rank=4)
        wake(model)
        x = images(model)
        y = model(x)
        fused_lora.unpatch(model, merge=True)
        assert all(type(m) is not fused_lora.FusedLoRALinear for m in model.modules())
        torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)

    def test_unpatch_of_a_merged_model_restores_the_base(self):
        model = build()
        bits = model.blocks[0].mlp.fc1.weight.clone()
        fused_lora.patch(model, rank=4)
        fused_lora.merge(wake(model))
        fused_lora.unpatch(model)
        assert torch.equal(model.blocks[0].mlp.fc1.weight, bits)

    def test_a_weight_shared_with_another_model_is_not_touched(self):
        teacher, student = build(), build()
        student.blocks[0].mlp.fc1.weight = teacher.blocks[0].mlp.fc1.weight
        bits = teacher.blocks[0].mlp.fc1.weight.clone()
        fused_lora.patch(student, rank=4)
        fused_lora.merge(wake(student))
        assert torch.equal(teacher.blocks[0].mlp.fc1.weight, bits)


def test_disable():
    model = build()
    x = images(model)
    y = model(x)
    fused_lora.patch(model, rank=4)
    tuned = wake(model)(x)
    with fused_lora.disable(model):
        torch.testing.assert_close(model(x), y)
    assert torch.equal(model(x), tuned)


@pytest.mark.parametrize("context", ["plain", "autocast", "checkpointing"])
def test_a_patched_model_trains_under(context):
    model = build().train()
    fused_lora.patch(model, rank=4)
    wake(model)
    model.set_grad_checkpointing(context == "checkpointing")
    with torch.autocast("cpu", torch.bfloat16, enabled=context == "autocast"):
        loss = model(images(model)).float().square().mean()
    loss.backward()
    adapters = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in adapters)


def test_a_patched_model_compiles_whole():
    torch._dynamo.reset()
    model = build()
    fused_lora.patch(model, rank=4)
    wake(model)
    x = images(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


class TestExplain:
    def test_names_each_shape_once_with_winners_and_losers(self):
        model = build()
        fused_lora.patch(model, rank=4)
        text = fused_lora.explain(model, batch_size=8)
        assert text.count("chosen") == 4
        assert text.count("lost") == 16
        assert "blocks.0.attn.qkv and 1 more" in text
        assert "M 136  K 48  N 144  rank 4|4|4" in text

    def test_for_another_dtype(self):
        model = build()
        fused_lora.patch(model, rank=4)
        assert "bfloat16" in fused_lora.explain(model, 8, dtype=torch.bfloat16)

    def test_refusals(self):
        model = build()
        with pytest.raises(fused_lora.PatchError, match="carries no fused_lora adapters"):
            fused_lora.explain(model)
        fused_lora.patch(model, rank=4)
        with pytest.raises(ValueError, match="batch_size must be a whole number from 1 on, got 0"):
            fused_lora.explain(model, 0)


def test_patch_on_the_meta_device_costs_no_memory():
    with torch.device("meta"):
        model = build()
    fused_lora.patch(model, rank=4)
    assert all(p.is_meta for p in model.parameters())


def test_two_calls_of_one_module_share_its_adapter():
    """ALBERT-style sharing: the same block twice."""
    model = build()
    model.blocks[1] = model.blocks[0]
    report = fused_lora.patch(model, rank=4)
    assert len(report.rows) == 4
    x = images(model)
    model(x).sum().backward()
    assert model.blocks[0].mlp.fc1.lora_B.grad is not None


def test_a_linear_in_two_attentions_is_adapted_once():
    model = build()
    model.blocks[1].attn.proj = model.blocks[0].attn.proj
    report = fused_lora.patch(model, rank=4)
    assert len(report.rows) == 7
    fused_lora.merge(model)
    fused_lora.unmerge(model)
    fused_lora.unpatch(model)


def test_torchs_encoder_layers_compute_the_same_by_their_fast_path():
    """In evaluation without gradients they read the linears that they call in training."""
    encoder = of_others.build("torch, encoder layers")
    x = of_others.example("")[0]
    fused_lora.patch(encoder, rank=2, example_input=x)
    wake(encoder)
    y = encoder(x)
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), y)
        with fused_lora.disable(encoder):
            assert not torch.allclose(encoder(x), y)


def test_a_report_and_an_explanation_name_the_weights_that_are_read():
    model = of_timm.build("BEiT")
    text = str(fused_lora.patch(model, rank=4, example_input=torch.randn(1, 3, 32, 32)))
    assert text.count("in the weight, at every read") == 2
    told = fused_lora.explain(model, batch_size=8)
    assert "blocks.0.attn.qkv and 1 more\n  the model reads these weights" in told
    assert told.count("chosen") == 3


def test_columns_are_where_the_model_takes_them_apart():
    """Keys, values and queries in an order and of widths of their own."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj = nn.Linear(12, 6 + 6 + 8), nn.Linear(8, 12)

        def forward(self, x):
            q, k, v = (self.qkv(x) * 2.0).split([6, 6, 8], dim=-1)
            return self.proj(F.scaled_dot_product_attention(q, k, v))

    block = nn.Sequential(
        OrderedDict(attn=Odd(), mlp=nn.Sequential(nn.Linear(12, 9), nn.GELU(), nn.Linear(9, 12)))
    )
    fused_lora.patch(nn.Sequential(block), rank=2, example_input=torch.randn(1, 5, 12))
    spans = {name: (s.start, s.stop) for name, s in block.attn.qkv.groups.items()}
    assert spans == {"q": (0, 6), "k": (6, 12), "v": (12, 20)}
    assert type(block.mlp[0]) is fused_lora.FusedLoRALinear


def test_a_forward_that_asks_for_values_is_tried_with_them():
    class Asking(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.norm = build(), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.model(self.norm(x) if x.sum().item() > -1e9 else x)

    model = Asking().train()
    image = torch.randn(1, 3, 32, 32)
    random = torch.get_rng_state()
    fused_lora.patch(model, rank=4, example_input=image, seed=0)
    assert torch.equal(random, torch.get_rng_state())
    assert model.norm.num_batches_tracked == 0 and torch.equal(
        model.norm.running_mean, torch.zeros(3)
    )


def test_nn_sequential_of_patched_blocks_pickles_by_reference():
    model = build()
    fused_lora.patch(model, rank=4)
    (twin,) = pickle.loads(pickle.dumps(nn.Sequential(model)))
    assert isinstance(twin.blocks[0].attn.qkv, nn.Linear)
