"""Separate q, k and v that share one x: what each would compute by itself, in every state."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fused_lora
from fused_lora.bench.saved_tensors import SavedBytes
from fused_lora.nn import FusedLoRAGroupedProjections, FusedLoRALinear
from fused_lora.nn.grouped_call import open_calls
from fused_lora.ops.lora_linear_many import LoRALinearMany
from tests.observe import operations
from tests.ops.plans import fix_plans


@pytest.fixture(autouse=True)
def plans(monkeypatch):
    """The same on every machine."""
    fix_plans(monkeypatch)


class Attention(nn.Module):
    """Separate projections, as transformers has them."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x, context=None):
        y = x if context is None else context
        q, k, v = self.q_proj(x), self.k_proj(y), self.v_proj(y)
        scores = (q @ k.transpose(-1, -2) / 5).softmax(-1)
        return self.out_proj(scores @ v)


def made(dtype=torch.float64, **options) -> Attention:
    torch.manual_seed(0)
    attention = Attention().to(dtype)
    for linear in attention.children():
        FusedLoRALinear.adopt(linear, 3, adapter_dtype=dtype, scale=0.5, **options)
        nn.init.normal_(linear.lora_B, std=0.1)
        linear.weight.requires_grad_(False)
        if linear.bias is not None:
            linear.bias.requires_grad_(False)
    return attention


def gathered(**options) -> Attention:
    return FusedLoRAGroupedProjections.gather(made(**options), [["q_proj", "k_proj", "v_proj"]])


def tokens(*shape, dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(*(shape or (2, 7)), 24, dtype=dtype)


def outcome(attention, *inputs, run=None):
    x = inputs[0].clone().requires_grad_()
    y = (attention if run is None else run)(x, *inputs[1:])
    trained = [p for p in attention.parameters() if p.requires_grad]
    return [y, *torch.autograd.grad(y.square().sum(), [x, *trained])]


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


class Counted:
    """How many matrices each call had, as a list of numbers."""

    def __init__(self, operations):
        self.operations = operations

    def __eq__(self, numbers):
        return [len(each.frames) for each in self.operations] == numbers

    def __bool__(self):
        return bool(self.operations)

    def __len__(self):
        return len(self.operations)

    def clear(self):
        self.operations.clear()


@pytest.fixture
def calls(monkeypatch):
    """How many matrices each shared call had."""
    found = Counted(operations(monkeypatch, LoRALinearMany))
    yield found
    assert not open_calls.calls


def test_one_call_gives_what_three_give(calls):
    same(outcome(gathered(), tokens()), outcome(made(), tokens()))
    assert calls == [3]
    with torch.no_grad():
        same(gathered()(tokens()), made()(tokens()))
    assert calls == [3, 3]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(calls, reentrant):
    attention = gathered()
    run = lambda x: checkpoint(attention, x, use_reentrant=reentrant)  # noqa: E731
    same(outcome(attention, tokens(), run=run) if not reentrant else _backward(run, attention),
         outcome(made(), tokens()))  # fmt: skip
    assert calls == [3, 3]


def _backward(run, attention):
    x = tokens().requires_grad_()
    y = run(x)
    y.square().sum().backward()
    return [y, x.grad, *(p.grad for p in attention.parameters() if p.requires_grad)]


def test_another_context_is_computed_by_each(calls):
    same(outcome(gathered(), tokens(), tokens(2, 5)), outcome(made(), tokens(), tokens(2, 5)))
    assert calls == [3]  # q came first, and k and v did not take theirs


def test_an_input_written_to_in_between_is_seen(calls):
    def scale_next(module, args, y):
        with torch.no_grad():
            args[0].mul_(2)

    ours, theirs = gathered(), made()
    for attention in (ours, theirs):
        attention.q_proj.register_forward_hook(scale_next)
    with torch.no_grad():
        same(ours(tokens()), theirs(tokens()))
    assert calls == [3]


@pytest.mark.parametrize(
    "register",
    [
        lambda m: m.register_forward_pre_hook(lambda _, args: (args[0] * 2,)),
        lambda m: m.register_full_backward_hook(lambda _, dx, __: (dx[0] * 2,)),
        lambda m: m.register_full_backward_pre_hook(lambda _, dy: (dy[0] * 2,)),
    ],
    ids=["before", "backward", "before backward"],
)
def test_hooks_that_change_what_goes_in_or_down(calls, register):
    ours, theirs = gathered(), made()
    for attention in (ours, theirs):
        register(attention.k_proj)
    same(outcome(ours, tokens()), outcome(theirs, tokens()))
    assert calls == []


def test_hooks_on_a_result_stay(calls):
    ours, theirs = gathered(), made()
    for attention in (ours, theirs):
        attention.v_proj.register_forward_hook(lambda _, __, y: y.square())
    same(outcome(ours, tokens()), outcome(theirs, tokens()))
    assert calls == [3]


@pytest.mark.parametrize("change", ["merged", "disabled", "released", "replaced", "forward"])
def test_a_sibling_that_is_not_itself_leaves_all_alone(calls, change):
    ours, theirs = gathered(), made()
    for attention in (ours, theirs):
        attention.eval()
        linear = attention.k_proj
        if change == "merged":
            linear.merge()
        elif change == "disabled":
            linear.adapter_enabled = False
        elif change == "released":
            linear.release()
        elif change == "replaced":
            torch.manual_seed(7)
            attention.k_proj = nn.Linear(24, 24, dtype=torch.float64)
        else:
            linear.forward = lambda x: x
    with torch.no_grad():
        same(ours(tokens()), theirs(tokens()))
    assert calls == []


def test_a_frozen_sibling_and_a_narrowed_one(calls):
    ours, theirs = gathered(), made()
    for attention in (ours, theirs):
        attention.k_proj.lora_A.requires_grad_(False)
        attention.v_proj.active_rank = 1
    same(outcome(ours, tokens()), outcome(theirs, tokens()))
    assert calls == [3]


def test_results_may_be_written_to():
    ours, theirs = gathered(), made()
    for attention in (ours, theirs):
        attention.q_proj.register_forward_hook(lambda _, __, y: y.mul_(2))
    same(outcome(ours, tokens()), outcome(theirs, tokens()))


def test_nothing_is_held_beyond_the_forward(calls):
    attention = gathered()

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    handle = attention.k_proj.register_forward_hook(stop)
    with pytest.raises(Stop):
        attention(tokens())
    assert not open_calls.calls
    handle.remove()
    same(outcome(attention, tokens()), outcome(made(), tokens()))


def test_grad_mode_that_changes_in_between(calls):
    def switch(on):
        return lambda *_: torch._C._set_grad_enabled(on)

    attention = gathered()
    attention.q_proj.register_forward_hook(switch(False))
    attention.k_proj.register_forward_hook(switch(True))
    y = attention(tokens())
    same(y, made()(tokens()))
    y.sum().backward()
    assert attention.k_proj.lora_B.grad is None and attention.v_proj.lora_B.grad is not None


def test_copies_pickles_and_release(calls):
    attention = gathered()
    for other in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        same(outcome(other, tokens()), outcome(made(), tokens()))
        assert isinstance(other, Attention)
    assert calls == [3, 3]
    assert attention.release() is attention and type(attention) is Attention
    assert "_grouped" not in attention.q_proj.__dict__
    same(outcome(attention, tokens()), outcome(made(), tokens()))
    assert calls == [3, 3]


def test_a_sibling_outside_its_module_and_one_called_twice(calls):
    attention = gathered()
    x = tokens()
    same(attention.q_proj(x), made().q_proj(x))
    attention.q_proj.register_forward_hook(lambda m, args, y: y + m.forward(args[0]))
    theirs = made()
    theirs.q_proj.register_forward_hook(lambda m, args, y: y + m.forward(args[0]))
    same(outcome(attention, x), outcome(theirs, x))


def test_threads_and_replicas(calls):
    attention = gathered()
    xs = [tokens() * i for i in range(1, 9)]
    with ThreadPoolExecutor(4) as pool:
        ys = list(pool.map(attention, xs))
    same(ys, [made()(x) for x in xs])
    replica = _replica(attention)
    same(replica(xs[0]), ys[0])
    assert calls == [3] * 9


def _replica(module):
    """What DataParallel makes on each device: children and parameters set anew."""
    twin = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        twin._modules[name] = _replica(child)
    for name, parameter in module._parameters.items():
        if parameter is None:
            twin._parameters[name] = None
        else:
            setattr(twin, name, parameter.clone())  # no leaf, no nn.Parameter
    return twin


@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiled_it_is_the_plain_path(calls, fullgraph):
    torch._dynamo.reset()
    attention = gathered(dtype=torch.float32)
    run = torch.compile(attention, backend="aot_eager", fullgraph=fullgraph)
    x = tokens(dtype=torch.float32)
    ours, theirs = outcome(attention, x, run=run), outcome(made(dtype=torch.float32), x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert calls == []


def test_transforms_and_functional_call(calls):
    attention, x = gathered(), tokens()
    parameters = dict(attention.named_parameters())
    doubled = {name: p.detach() * 2 for name, p in parameters.items()}
    same(torch.func.functional_call(attention, doubled, (x,)),
         torch.func.functional_call(made(), doubled, (x,)))  # fmt: skip
    assert calls == [3]
    jvp = torch.func.jvp(attention, (x,), (x,))[1]
    same(jvp, torch.func.jvp(made(), (x,), (x,))[1])
    assert calls == [3]


def test_inference_mode_and_autocast(calls):
    with torch.inference_mode():
        same(gathered()(tokens()), made()(tokens()))
    assert calls == []  # no version says whether x was written to
    x, kept = tokens(dtype=torch.float32).requires_grad_(), []
    for attention in (gathered(dtype=torch.float32), made(dtype=torch.float32)):
        with torch.autocast("cpu", torch.bfloat16), SavedBytes(attention, [x]) as saved:
            y = attention(x)
        kept.append((saved.total, y))
    assert kept[1][0] - kept[0][0] == 2 * x.numel() * 2
    torch.testing.assert_close(kept[0][1], kept[1][1], rtol=0.05, atol=0.02)


def test_of_other_dtypes_torch_speaks_for_the_linear_itself():
    attention = gathered()
    with pytest.raises(TypeError, match=r"x is torch.float32 and w is torch.float64"):
        attention(tokens().float())
    with pytest.raises(TypeError, match="fused already"):
        FusedLoRAGroupedProjections.gather(attention, [["q_proj", "k_proj"]])


def test_patch_finds_them_says_so_and_unpatch_undoes_it(calls):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=16, patch_size=8,
    )  # fmt: skip
    model, x = transformers.ViTModel(config), torch.randn(2, 3, 16, 16)
    kinds = [type(m) for m in model.modules()]
    report = fused_lora.patch(model, rank=4)
    assert [row.reason for row in report.shares] == ["", ""]
    assert "layers.0.attention and 1 more: q_proj, k_proj, v_proj in one call" in str(report)
    model(x)
    assert calls == [3, 3]
    fused_lora.unpatch(model)
    assert [type(m) for m in model.modules()] == kinds
    report = fused_lora.patch(model, rank=4, level="linear")
    assert not report.shares
    fused_lora.unpatch(model)
    report = fused_lora.patch(model, rank=4, dora=True)
    assert "each computes by itself: q_proj has dora, which scales y" in str(report)
