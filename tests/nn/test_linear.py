"""FusedLoRALinear is an nn.Linear: keys, copies, moves, merged state."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

from fused_lora import FusedLoRAGroupedLinear, FusedLoRALinear

THIRDS = {"q": (0, 8), "k": (8, 16), "v": (16, 24)}


def single(**options):
    return filled(FusedLoRALinear(12, 24, rank=4, **options))


def grouped(**options):
    return filled(FusedLoRAGroupedLinear(12, 24, spans=THIRDS, rank=4, **options))


def filled(module):
    """With b away from zero, so that the adapters do something."""
    for _, b in module.adapters():
        nn.init.normal_(b, std=0.1)
    return module


MAKERS = pytest.mark.parametrize("make", [single, grouped])


def expected(module, x):
    """The equation by hand."""
    y = nn.functional.linear(x, module.weight, module.bias)
    pairs = zip(module.adapters(), module.scales, module.groups.values(), strict=True)
    for (a, b), s, span in pairs:
        y[..., span.start : span.stop] += s * (x @ a.T @ b.T)
    return y


@MAKERS
def test_forward_is_the_equation(make):
    module, x = make(scale=0.5), torch.randn(2, 5, 12)
    torch.testing.assert_close(module(x), expected(module, x))
    assert isinstance(module, nn.Linear)


def test_starts_as_the_base():
    module, x = FusedLoRALinear(12, 24, rank=4), torch.randn(5, 12)
    torch.testing.assert_close(module(x), nn.functional.linear(x, module.weight, module.bias))
    assert not module.adapter()[1].any()
    bound = math.sqrt(6 / ((1 + 5) * 12))  # kaiming uniform, gradient factor sqrt(5)
    assert module.adapter()[0].abs().max() <= bound


def test_keys():
    assert set(single().state_dict()) == {"weight", "bias", "lora_A", "lora_B"}
    assert "lora_A_q" in grouped().state_dict()
    assert len(grouped(bias=False).state_dict()) == 7


@MAKERS
def test_deepcopy_and_pickle(make):
    module, x = make(), torch.randn(5, 12)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), module(x))
        assert twin.groups == module.groups
        with torch.no_grad():
            twin.adapter(next(iter(twin.groups)))[1].zero_()
        assert not torch.equal(twin(x), module(x))


def test_torch_save_round_trip():
    module, buffer = single(), io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    twin = FusedLoRALinear(12, 24, rank=4)
    twin.load_state_dict(torch.load(buffer))
    pairs = zip(twin.parameters(), module.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)


@MAKERS
def test_to_another_dtype(make):
    module = make().to(torch.float64)
    x = torch.randn(5, 12, dtype=torch.float64)
    torch.testing.assert_close(module(x), expected(module, x))


def test_meta_device():
    module = FusedLoRALinear(12, 24, rank=4, device="meta")
    assert module(torch.empty(5, 12, device="meta")).shape == (5, 24)
    real = module.to_empty(device="cpu")
    nn.Linear.reset_parameters(real)
    real.reset_adapters()
    assert torch.isfinite(real(torch.randn(5, 12))).all()
    with torch.device("meta"):
        assert FusedLoRALinear(12, 24, rank=4).scales == (1.0,)


@MAKERS
def test_reset_parameters_fills_the_adapters_too(make):
    module = make().to_empty(device="meta").to_empty(device="cpu")
    for p in module.parameters():
        p.data.fill_(math.nan)
    module.reset_parameters()
    assert all(torch.isfinite(p).all() for p in module.parameters())
    assert not any(b.any() for _, b in module.adapters())


def test_bf16_base_with_fp32_adapters():
    module = FusedLoRALinear(12, 24, rank=4, dtype=torch.bfloat16)
    assert module.weight.dtype is torch.bfloat16
    assert module.adapter()[0].dtype is torch.float32
    y = module(torch.randn(5, 12, dtype=torch.bfloat16))
    y.float().sum().backward()
    assert module.adapter()[1].grad.dtype is torch.float32


class TestVanillaCheckpoints:
    @MAKERS
    def test_loads_strictly_and_keeps_the_adapters(self, make):
        module, plain = make(), nn.Linear(12, 24)
        before = [a.clone() for a, _ in module.adapters()]
        module.load_state_dict(plain.state_dict(), strict=True)
        assert torch.equal(module.weight, plain.weight)
        assert all(torch.equal(a, p) for (a, _), p in zip(module.adapters(), before, strict=True))

    def test_half_an_adapter_is_an_error(self):
        state = single().state_dict()
        del state["lora_B"]
        with pytest.raises(RuntimeError, match=r"Missing key.*lora_B"):
            single().load_state_dict(state)

    def test_missing_base_keys_are_an_error(self):
        with pytest.raises(RuntimeError, match=r"Missing key.*bias"):
            single().load_state_dict({"weight": torch.randn(24, 12)})


class TestMerge:
    @MAKERS
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_merge_then_unmerge_restores_the_bits(self, make, dtype):
        module = make(dtype=dtype)
        weight, bits = module.weight, module.weight.detach().clone()
        module.merge()
        assert module.merged
        assert not torch.equal(module.weight, bits)
        module.unmerge()
        assert module.weight is weight
        assert torch.equal(module.weight, bits)

    @MAKERS
    def test_merged_forward(self, make):
        module, x = make(), torch.randn(5, 12)
        before = module(x)
        module.eval().merge()
        torch.testing.assert_close(module(x), before)

    def test_a_shared_weight_is_not_modified(self):
        module, other = single(), nn.Linear(12, 24)
        other.weight = module.weight
        bits = other.weight.detach().clone()
        module.merge()
        assert torch.equal(other.weight, bits)

    def test_a_state_dict_is_refused_while_merged(self):
        module = single()
        before = {key: value.clone() for key, value in module.state_dict().items()}
        module.merge()
        with pytest.raises(RuntimeError, match=r"state_dict: this module is merged.*merge=True"):
            module.state_dict()
        module.unmerge()
        assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())

    def test_survives_moves_and_copies(self):
        module = single()
        bits = module.weight.detach().clone()
        module.merge()
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            twin.double().unmerge()
            assert torch.equal(twin.weight, bits.double())

    def test_a_move_keeps_the_parameter(self):
        module = single()
        weight = module.weight
        module.merge()
        module.to(torch.bfloat16).unmerge()
        assert module.weight is weight
        assert weight.dtype is torch.bfloat16

    def test_a_move_that_fails_leaves_no_trace(self):
        module = single()
        module.merge()
        with pytest.raises(TypeError):
            module._apply(lambda t: None + t)
        assert set(dict(module.named_parameters())) == {"weight", "bias", "lora_A", "lora_B"}
        module.unmerge()

    def test_released_while_merged_it_trains_as_before(self):
        for trains in (True, False):
            module = single()
            module.weight.requires_grad_(trains)
            module.merge()
            assert module.release().weight.requires_grad is trains

    def test_disabled_while_merged_computes_the_base(self):
        module, x = single().eval(), torch.randn(5, 12)
        base = nn.functional.linear(x, module.weight, module.bias)
        module.merge()
        module.adapter_enabled = False
        assert torch.equal(module(x), base)

    def test_refusals(self):
        module = single()
        with pytest.raises(RuntimeError, match="not merged"):
            module.unmerge()
        module.merge()
        with pytest.raises(RuntimeError, match="already merged"):
            module.merge()
        with pytest.raises(RuntimeError, match="would receive no gradient"):
            module(torch.randn(5, 12))
        with pytest.raises(RuntimeError, match="is merged: call unmerge"):
            module.load_state_dict(nn.Linear(12, 24).state_dict())
        with pytest.raises(RuntimeError, match="merged; unmerge"):
            module.set_scale(2.0)

    def test_stochastic_rounding_keeps_the_mean_of_small_updates(self):
        """Updates a hundredth of w's spacing vanish to nearest, and survive in the mean."""
        module = FusedLoRALinear(256, 256, rank=1, dtype=torch.bfloat16)
        with torch.no_grad():
            module.weight.fill_(1.0)
            module.adapter()[0].fill_(1.0)
            module.adapter()[1].fill_(2**-7 / 100)  # bf16 spacing above 1 is 2**-7
        module.merge()
        assert (module.weight == 1).all()
        module.unmerge()
        module.merge("stochastic", seed=7)
        first = module.weight.detach().clone()
        assert (first.float().mean() - 1 - 2**-7 / 100).abs() < 2**-7 / 100 * 0.2
        module.unmerge()
        module.merge("stochastic", seed=7)
        assert torch.equal(module.weight, first)
        module.unmerge()
        module.merge("stochastic", seed=8)
        assert not torch.equal(module.weight, first)


class TestDropout:
    @MAKERS
    def test_off_in_eval(self, make):
        module, x = make(dropout=0.5).eval(), torch.randn(5, 12)
        torch.testing.assert_close(module(x), expected(module, x))

    @MAKERS
    def test_keeps_the_mean_in_training(self, make):
        module, x = make(dropout=0.5), torch.randn(1, 12)
        with torch.no_grad():
            mean = torch.stack([module(x) for _ in range(4000)]).mean(0)
            torch.testing.assert_close(mean, expected(module, x), rtol=0, atol=0.02)

    @pytest.mark.parametrize("make", [single, grouped])
    def test_compiles_whole(self, make):
        torch._dynamo.reset()
        module, x = make(dropout=1e-9, scale=0.5), torch.randn(5, 12)
        traced = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(traced(x), expected(module, x))
        module.set_scale(2.0)
        torch.testing.assert_close(traced(x), expected(module, x))

    def test_gradients_flow(self):
        module, x = single(dropout=0.1), torch.randn(50, 12, requires_grad=True)
        module(x).sum().backward()
        assert all(p.grad is not None for p in (x, *module.adapter()))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_autocast_and_bf16(self, dtype):
        module = single(dropout=0.1, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16):
            assert module(torch.randn(5, 12, dtype=dtype)).dtype is torch.bfloat16
        assert module(torch.randn(5, 12, dtype=dtype)).dtype is dtype


class TestScale:
    def test_alpha_over_rank(self):
        assert single().scales == (1.0,)
        assert single(alpha=8).scales == (2.0,)
        assert single(alpha=8, rank_stabilized=True).scales == (4.0,)
        assert grouped(scale=0.25).scales == (0.25,) * 3

    def test_set_scale(self):
        module, x = grouped(), torch.randn(5, 12)
        module.set_scale(3.0, "k")
        assert module.scales == (1.0, 3.0, 1.0)
        torch.testing.assert_close(module(x), expected(module, x))


class TestAdopt:
    def test_is_the_same_object_with_the_same_weight(self):
        linear, x = nn.Linear(12, 24), torch.randn(5, 12)
        weight, y, calls = linear.weight, linear(x), []
        linear.register_forward_hook(lambda *_: calls.append(1))
        adopted = FusedLoRALinear.adopt(linear, rank=4)
        assert adopted is linear
        assert adopted.weight is weight
        torch.testing.assert_close(adopted(x), y)
        assert calls
        assert type(adopted.release()) is nn.Linear
        assert set(adopted.state_dict()) == {"weight", "bias"}
        assert torch.equal(adopted(x), y)

    def test_a_failed_adoption_leaves_the_linear_as_it_was(self):
        linear = nn.Linear(12, 24)
        before = set(vars(linear))
        for fail in (
            lambda: FusedLoRALinear.adopt(linear, rank=-1),
            lambda: FusedLoRAGroupedLinear.adopt(linear, THIRDS, {"q": 4, "k": 4, "v": 0}),
        ):
            with pytest.raises(ValueError, match="rank must be"):
                fail()
            assert type(linear) is nn.Linear
            assert set(vars(linear)) == before
            assert set(linear.state_dict()) == {"weight", "bias"}


@MAKERS
def test_compiles_without_recompiling_when_the_scale_changes(make):
    import torch._dynamo.testing

    torch._dynamo.reset()
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    module, x = make(), torch.randn(5, 12)
    compiled = torch.compile(module, fullgraph=True, backend=frames)
    for scale in (1.0, 0.5, 2.0):
        module.set_scale(scale)
        torch.testing.assert_close(compiled(x), expected(module, x))
    assert frames.frame_count == 1


@MAKERS
def test_functional_call_and_repr(make):
    module, x = make(scale=0.5), torch.randn(5, 12)
    state = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    assert not torch.func.functional_call(module, state, (x,)).any()
    assert "scale=0.5" in repr(module)
    assert "in_features=12" in repr(module)
