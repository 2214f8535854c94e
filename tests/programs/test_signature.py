"""Whatever changes what is right between two steps is seen: a warm model equals a fresh one."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fused_lora
from fused_lora.nn import AdaptedLinear
from fused_lora.programs import run
from tests.patching.models import build, images, wake

each_level = pytest.mark.parametrize("level", ["block", "linear"])


def patched(level="block", make=build, dtype=torch.float64, **options):
    torch.manual_seed(3)
    model = make().to(dtype)
    fused_lora.patch(model, rank=4, scale=0.5, level=level, adapter_dtype=dtype, **options)
    return wake(model).train()


def outcome(model, x, around=None):
    """y, and the gradients of all that trains; of a merged model y alone."""
    torch.manual_seed(7)
    for p in model.parameters():
        p.grad = None
    with around() if around else torch.enable_grad():
        y = model(x)
    if y.requires_grad:
        y.double().square().sum().backward()
    return [y, *(p.grad for p in model.parameters())]


def assert_same(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            tight = mine.dtype is torch.float64
            torch.testing.assert_close(
                mine, other, **({"rtol": 1e-9, "atol": 1e-11} if tight else {})
            )


def first(model, name):
    return model.get_submodule(f"blocks.0.{name}".rstrip("."))


def linears(model):
    return [module for module in model.modules() if isinstance(module, AdaptedLinear)]


def adapters(model):
    return [p for name, p in model.named_parameters() if "lora_" in name]


def scaled(module, args, out):
    return out * 1.5


def own_forward(model):
    mlp = first(model, "mlp")
    mlp.forward = lambda x: type(mlp).plain.forward(mlp, x) if hasattr(mlp, "plain") else x * 2


def other_weight(model):
    linear = first(model, "mlp.fc1")
    linear.weight = nn.Parameter(linear.weight.detach() * 2, requires_grad=False)


@torch.no_grad()
def write_weight(model):
    first(model, "mlp.fc2").weight.mul_(1.25)


def data_of_weight(model):
    weight = first(model, "attn.proj").weight
    weight.data = weight.data.t().contiguous().t() * 0.75


def without_bias(model):
    first(model, "attn.qkv").bias = None


def shifted(model):
    state = {k: v + 0.01 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict(state)


def freeze_a(model):
    for name, p in model.named_parameters():
        p.requires_grad_("lora_B" in name)


def train_everything(model):
    model.requires_grad_(True)


def each(model, method, *args):
    for linear in linears(model):
        getattr(linear, method)(*args)


def put(path, name, value, model):
    setattr(first(model, path), name, value)


def hook(path, how, function, model):
    getattr(first(model, path), how)(function)


CHANGES = {
    "merged": lambda m: (m.eval(), fused_lora.merge(m)),
    "merged and back": lambda m: (fused_lora.merge(m), fused_lora.unmerge(m)),
    "one disabled": partial(put, "mlp.fc1", "adapter_enabled", False),
    "eval": lambda m: m.eval(),
    "scale": lambda m: each(m, "set_scale", 2.0),
    "scale of one": lambda m: first(m, "attn.qkv").set_scale(3.0, "k"),
    "active rank": partial(put, "mlp.fc1", "active_rank", 2),
    "active rank in q, k and v": partial(put, "attn.qkv", "active_rank", 1),
    "a frozen": freeze_a,
    "all that there is trains": train_everything,
    "float32": lambda m: m.float(),
    "bfloat16": lambda m: m.bfloat16(),
    "another state": shifted,
    "another weight": other_weight,
    "a weight written in place": write_weight,
    "a weight's data, laid out otherwise": data_of_weight,
    "no bias": without_bias,
    "another child": partial(put, "mlp", "act", nn.ReLU()),
    "another norm": partial(put, "", "norm1", nn.LayerNorm(48, dtype=torch.float64)),
    "eps": partial(put, "norm2", "eps", 0.5),
    "heads": lambda m: (put("attn", "num_heads", 6, m), put("attn", "head_dim", 8, m)),
    "attention without scaled_dot_product_attention": partial(put, "attn", "fused_attn", False),
    "drop path": lambda m: put("", "drop_path1", dropping(), m),
    "recompute gemm": lambda m: [put_recompute(b, "gemm") for b in m.blocks],
    "recompute none": lambda m: [put_recompute(b, "none") for b in m.blocks],
    "dropout in the MLP": partial(put, "mlp.drop1", "p", 0.5),
    "dropout behind the attention": partial(put, "attn.proj_drop", "p", 0.5),
    "a forward of its own": own_forward,
    "a hook on an activation": partial(hook, "mlp.act", "register_forward_hook", scaled),
    "a hook on an Identity": partial(hook, "attn.q_norm", "register_forward_hook", scaled),
    "a hook on a LayerNorm": partial(hook, "norm1", "register_forward_hook", scaled),
    "a hook on a projection": partial(hook, "attn.proj", "register_forward_hook", scaled),
    "a hook before a linear": partial(
        hook, "mlp.fc2", "register_forward_pre_hook", lambda module, args: (args[0] * 2,)
    ),
    "a hook on a block": partial(hook, "", "register_forward_hook", scaled),
    "a hook on gradients": partial(
        hook, "mlp.fc1", "register_full_backward_hook", lambda m, gi, go: (gi[0] * 3,)
    ),
    "a hook before gradients": partial(
        hook, "attn", "register_full_backward_pre_hook", lambda m, go: (go[0] * 3,)
    ),
}


def put_recompute(block, mode):
    if hasattr(block, "recompute"):
        block.recompute = mode


@each_level
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_between_two_steps(change, level, monkeypatch):
    model = patched(level)
    x = images(model)
    fresh = copy.deepcopy(model)
    outcome(model, x)
    outcome(model, x)
    for each_one in (model, fresh):
        torch.manual_seed(1)
        change(each_one)
    x = x.to(next(model.parameters()).dtype)
    ours = outcome(model, x)
    monkeypatch.setenv("FUSED_LORA_PROGRAMS", "0")
    run.forget()
    assert_same(ours, outcome(fresh, x))


def dropping():
    from timm.layers import DropPath

    return DropPath(0.5).train()


def removed(model, x):
    handle = first(model, "mlp.act").register_forward_hook(scaled)
    outcome(model, x)
    handle.remove()


@each_level
def test_a_hook_that_went(level):
    model, x = patched(level), images(build()).double()
    before = outcome(model, x)
    removed(model, x)
    assert_same(outcome(model, x), before)


def test_a_forward_of_a_class_that_was_replaced(monkeypatch):
    model, x = patched(), images(build()).double()
    outcome(model, x)
    monkeypatch.setattr(type(first(model, "mlp.act")), "forward", lambda self, x: F.relu(x))
    ours = outcome(model, x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), ours[0])
    fresh = copy.deepcopy(model)
    assert_same(ours, outcome(fresh, x))


AROUND = {
    "autocast": partial(torch.autocast, "cpu", torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "no flash attention": partial(sdpa_kernel, SDPBackend.MATH),
}


@each_level
@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_settings_of_torch_between_two_steps(around, level, monkeypatch):
    model, x = patched(level, dtype=torch.float32), images(build())
    fresh = copy.deepcopy(model)
    before = outcome(model, x)
    inside = outcome(model, x, around)
    after = outcome(model, x)
    monkeypatch.setenv("FUSED_LORA_PROGRAMS", "0")
    run.forget()
    assert_same(inside, outcome(copy.deepcopy(fresh), x, around))
    for each_one in (before, after):
        assert_same(each_one, outcome(copy.deepcopy(fresh), x))


@each_level
def test_threads_of_a_kernel(level):
    model, x = patched(level), images(build()).double()
    before, count = outcome(model, x), torch.get_num_threads()
    try:
        torch.set_num_threads(count + 1)
        assert_same(outcome(model, x), before)
    finally:
        torch.set_num_threads(count)


@each_level
def test_other_sizes_strides_and_leaves(level):
    model = patched(level)
    block = model.blocks[0]
    for shape in ((2, 17, 48), (1, 17, 48), (2, 5, 48), (0, 5, 48), (2, 17, 48)):
        for lay in (lambda t: t, lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)):
            for trains in (False, True):
                x = lay(torch.randn(shape, dtype=torch.float64)).requires_grad_(trains)
                ys = [block(x), copy.deepcopy(block)(x.contiguous())]
                torch.testing.assert_close(*ys)
                assert ys[0].shape == shape


@each_level
def test_copies_and_pickles_decide_for_themselves(level):
    model, x = patched(level), images(build()).double()
    before = outcome(model, x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    copies.append(torch.load(buffer, weights_only=False))
    for other in copies:
        assert_same(outcome(other, x), before)
        first(other, "mlp.fc1").set_scale(5.0)
        assert not torch.equal(outcome(other, x)[0], before[0])
    assert_same(outcome(model, x), before)


def test_two_threads_share_programs_without_a_race():
    x = images(build()).double()
    models = [patched() for _ in range(2)]
    for p in adapters(models[1]):
        p.data.mul_(2.0)
    expected = [outcome(copy.deepcopy(model), x)[0] for model in models]
    run.forget()
    wrong, start = [], threading.Barrier(2)

    def steps(model, right):
        start.wait()
        for _ in range(8):
            y = model(x)
            y.square().sum().backward()
            if not torch.allclose(y, right, rtol=1e-9):
                wrong.append(y)

    threads = [
        threading.Thread(target=steps, args=pair) for pair in zip(models, expected, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    for model in models:
        alone = copy.deepcopy(model)
        for p in alone.parameters():
            p.grad = None
        for _ in range(8):
            alone(x).square().sum().backward()
        for mine, other in zip(model.parameters(), alone.parameters(), strict=True):
            assert (mine.grad is None) == (other.grad is None)
            if mine.grad is not None:
                torch.testing.assert_close(mine.grad, other.grad)
