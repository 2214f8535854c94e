"""Adapters around linears that compute y their own way: a fake 8-bit one, a packed 4-bit one."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fused_lora
from fused_lora.nn import AdaptedLinear, FusedLoRALinear, adopt_additive
from tests.patching.models import build, images, wake


class Int8Linear(nn.Linear):
    """w = scale x codes, one scale per output."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")
        w = linear.weight.detach()
        scale = w.abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        codes = (w / scale).round().to(torch.int8)
        self.weight = nn.Parameter(self.pack(codes), requires_grad=False)
        self.bias = linear.bias

    def pack(self, codes):
        return codes

    def codes(self):
        return self.weight

    def forward(self, x):
        return F.linear(x, self.codes().to(x.dtype) * self.scale.to(x.dtype), self.bias)


class PackedLinear(Int8Linear):
    """Its weight has neither the shape nor the dtype of a matrix, as a 4-bit one has not."""

    def pack(self, codes):
        return (codes.flatten().to(torch.int16) + 128).to(torch.uint8)[:, None]

    def codes(self):
        flat = self.weight.squeeze(1).to(torch.int16) - 128
        return flat.view(self.out_features, self.in_features)


def quantised(model, kind):
    for block in model.blocks:
        for holder, name in [(block.attn, "qkv"), (block.attn, "proj"), (block.mlp, "fc1")]:
            setattr(holder, name, kind(getattr(holder, name)))
    return model


@pytest.mark.parametrize("kind", [Int8Linear, PackedLinear])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_forward_and_gradients_are_the_base_and_the_adapter(kind, dropout):
    linear = kind(nn.Linear(12, 20, dtype=torch.float64))
    base = copy.deepcopy(linear)
    module = adopt_additive(linear, 3, alpha=6, dropout=dropout, adapter_dtype=torch.float64)
    assert module is linear and isinstance(module, (AdaptedLinear, kind))
    nn.init.normal_(module.lora_B)
    module.train(not dropout)
    x = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    expected = base(x) + 2.0 * (x @ module.lora_A.T) @ module.lora_B.T
    torch.testing.assert_close(module(x), expected)
    dy, leaves = torch.randn_like(expected), (x, module.lora_A, module.lora_B)
    found = torch.autograd.grad(module(x), leaves, dy)
    for ours, theirs in zip(found, torch.autograd.grad(expected, leaves, dy), strict=True):
        torch.testing.assert_close(ours, theirs)
    if dropout:
        module.train()(x).sum().backward()
        assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("kind", [Int8Linear, PackedLinear])
def test_a_quantised_model_is_patched_trained_saved_and_taken_back(kind, tmp_path):
    model = quantised(build(), kind)
    x = images(model)
    y = model(x)
    report = fused_lora.patch(model, rank=4, keep_forward=True)
    assert len(report.rows) == 8
    assert sum(row.plan == "added to its own forward" for row in report.rows) == 6
    assert "blocks.0.attn.qkv and 5 more\n  added to its own forward" in fused_lora.explain(model)
    torch.testing.assert_close(model(x), y)
    wake(model)(x).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name
    learned = model(x)
    with fused_lora.disable(model):
        torch.testing.assert_close(model(x), y)
    fused_lora.save(model, tmp_path)
    other = quantised(copy.deepcopy(build()), kind)
    other.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_" not in k})
    fused_lora.patch(other, rank=4, keep_forward=True)
    fused_lora.load(other, tmp_path)
    torch.testing.assert_close(other(x), learned)
    fused_lora.unpatch(model)
    assert type(model.blocks[0].mlp.fc1) is kind and type(model.blocks[0].mlp.fc2) is nn.Linear
    assert torch.equal(model(x), y)


def test_copies_pickles_and_keys():
    module = adopt_additive(
        Int8Linear(nn.Linear(12, 20)), {"q": 2, "v": 3}, {"q": (0, 8), "v": (9, 20)}
    )
    wake(module)
    x = torch.randn(3, 12)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(twin) is type(module)
        assert torch.equal(twin(x), module(x))
    assert {"weight", "scale", "bias", "lora_A_q", "lora_B_v"} < set(module.state_dict())


def test_compiles_whole():
    module = wake(adopt_additive(Int8Linear(nn.Linear(12, 20)), 3))
    x = torch.randn(3, 12)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dora": True}, "dora reads the base weight, which Int8Linear hides"),
        ({"init": "pissa"}, "init='pissa' reads the base weight, which Int8Linear hides"),
        ({"init": "svd", "mid": "full"}, "init='svd' reads the base weight"),
        ({"rank": 0}, "rank must be a whole number from 1 on, got 0"),
        ({"spans": {"q": (0, 21)}}, r"span 'q' = \(0, 21\) is empty, overlaps another, or leaves"),
    ],
)
def test_bad_options_change_nothing(options, message):
    linear = Int8Linear(nn.Linear(12, 20))
    state = set(linear.__dict__)
    with pytest.raises(ValueError, match=message):
        adopt_additive(linear, **options)
    assert type(linear) is Int8Linear and set(linear.__dict__) == state


def test_what_cannot_be_had():
    with pytest.raises(TypeError, match="expected an nn.Linear without adapters"):
        adopt_additive(FusedLoRALinear(3, 3, rank=1))
    with pytest.raises(TypeError, match="expected an nn.Linear without adapters"):
        adopt_additive(nn.Conv2d(3, 3, 1))
    model = quantised(build(), Int8Linear)
    with pytest.raises(fused_lora.PatchError, match="keep_forward=True keeps it and adds the"):
        fused_lora.patch(model, rank=4)
    fused_lora.patch(model, rank=4, keep_forward=True)
    message = "qkv: merge: a Int8Linear computes with a weight of its own making"
    with pytest.raises(fused_lora.PatchError, match=message):
        fused_lora.merge(model)
    assert not any(m.merged for m in model.modules() if isinstance(m, AdaptedLinear))


@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes(bits):
    bnb = pytest.importorskip("bitsandbytes")
    plain = nn.Linear(192, 128)
    kind = bnb.nn.Linear8bitLt if bits == 8 else bnb.nn.Linear4bit
    options = {"has_fp16_weights": False} if bits == 8 else {"compute_dtype": torch.float32}
    linear = kind(192, 128, **options)
    linear.load_state_dict(plain.state_dict())
    train_around(linear.to("cpu"), 192)


def test_torchao():
    quantization = pytest.importorskip("torchao.quantization")
    holder = nn.Sequential(nn.Linear(192, 128))
    quantization.quantize_(holder, quantization.Int8WeightOnlyConfig())
    with pytest.raises(TypeError, match="weight is a Int8Tensor, not a plain tensor"):
        FusedLoRALinear.adopt(holder[0])
    train_around(holder[0], 192)


def train_around(linear, k):
    x, kind = torch.randn(5, k), type(linear)
    y = linear(x)
    module = wake(adopt_additive(linear, 4, scale=0.5))
    expected = y + 0.5 * (x @ module.lora_A.T) @ module.lora_B.T
    torch.testing.assert_close(module(x), expected)
    module(x).square().sum().backward()
    assert all(p.grad is not None for p in module.lora_parameters())
    assert torch.equal(module.release()(x), y) and type(module) is kind


class MaskedBias(nn.Linear):
    """DINOv3's qkv: an ordinary weight, and a bias of which a part is masked."""

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.register_buffer("bias_mask", torch.ones(self.out_features))
        self.bias_mask[self.out_features // 3 : 2 * self.out_features // 3] = 0

    def forward(self, x):
        return F.linear(x, self.weight, self.bias * self.bias_mask.to(self.bias.dtype))


class Renamed(nn.Linear):
    """A subclass that adds nothing."""


class Squashed(nn.Linear):
    """One that computes with a function of its weight."""

    def forward(self, x):
        return F.linear(x, self.weight.tanh(), self.bias)


class FakeQuantised(nn.Linear):
    """One that rounds its weight on the way, as training for quantisation does."""

    def forward(self, x):
        step = self.weight.abs().amax() / 127
        return F.linear(x, (self.weight / step).round() * step, self.bias)


class Particular(nn.Linear):
    """One that takes images alone."""

    def forward(self, x):
        b, h, w, c = x.shape
        return super().forward(x.view(b, h * w, c)).view(b, h, w, -1)


def with_kind(kind):
    """A ViT whose qkv and fc1 are of class ``kind``."""
    model = build()
    for block in model.blocks:
        for holder, name in ((block.attn, "qkv"), (block.mlp, "fc1")):
            plain = getattr(holder, name)
            made = kind(plain.in_features, plain.out_features)
            made.load_state_dict(plain.state_dict(), strict=False)
            nn.init.normal_(made.bias)
            setattr(holder, name, made)
    return model.eval()


@pytest.mark.parametrize("kind", [MaskedBias, Renamed])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_ordinary_weight_is_merged(kind, dtype):
    model = with_kind(kind).to(dtype)
    x = images(model)
    y = model(x)
    fused_lora.patch(model, rank=4, keep_forward=True)
    learned = wake(model)(x).detach()
    weights = {n: p for n, p in model.named_parameters() if n.endswith("qkv.weight")}
    bits = {name: weight.clone() for name, weight in weights.items()}
    close = {"rtol": 0.1, "atol": 0.1} if dtype is torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    fused_lora.merge(model)
    torch.testing.assert_close(model(x), learned, **close)
    with fused_lora.disable(model):
        torch.testing.assert_close(model(x), y, **close)
    with pytest.raises(RuntimeError, match="merged into the weight and would receive no gradient"):
        model.train()(x)
    fused_lora.unmerge(model.eval())
    for name, weight in weights.items():
        assert model.get_parameter(name) is weight and torch.equal(weight, bits[name])
    torch.testing.assert_close(model(x), learned)
    fused_lora.unpatch(model, merge=True)
    assert type(model.blocks[0].attn.qkv) is kind
    torch.testing.assert_close(model(x), learned, **close)


@pytest.mark.parametrize("kind", [Squashed, FakeQuantised])
def test_what_is_not_linear_in_its_weight_is_not_merged(kind):
    model = with_kind(Renamed)
    model.blocks[1].mlp.fc1.__class__ = kind
    x = images(model)
    fused_lora.patch(model, rank=4, keep_forward=True)
    y = wake(model)(x)
    message = rf"blocks\.1\.mlp\.fc1: merge: the forward of a {kind.__name__} adds something else"
    with pytest.raises(fused_lora.PatchError, match=message):
        fused_lora.merge(model)
    assert not any(m.merged for m in model.modules() if isinstance(m, AdaptedLinear))
    torch.testing.assert_close(model(x), y)


def test_what_cannot_be_asked_is_not_merged():
    module = wake(adopt_additive(Particular(12, 20), 3))
    with pytest.raises(RuntimeError, match="of a Particular could not be asked .ValueError"):
        module.merge()
    assert not module.merged and module(torch.randn(1, 2, 2, 12)).isfinite().all()


@pytest.mark.parametrize("old, new", fused_lora.nn.RENAMED.items())
def test_an_old_name_works_and_warns(old: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"{old} is called {new} now"):
        assert getattr(fused_lora.nn, old) is getattr(fused_lora.nn, new)
    if new in fused_lora.__all__:
        with pytest.warns(DeprecationWarning, match=old):
            assert getattr(fused_lora, old) is getattr(fused_lora, new)
    with pytest.raises(AttributeError, match="has no attribute 'absent'"):
        fused_lora.absent  # noqa: B018
