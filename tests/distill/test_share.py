"""share_adapters: one set of parameters, two models, autograd's gradients."""

import copy
import gc
import pickle

import pytest
import torch
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fused_lora
from fused_lora.nn import shared_parameters
from fused_lora.nn.shared import SharedLoRALinear
from tests.distill.pairs import adapters, grads, images, same, student, teacher
from tests.patching.models import GluMlp, SwiGLU


def pair(mapping="even", rank=4, options=None, share=None, **model):
    """A teacher and the student that shares its adapters."""
    made, small = teacher(rank, options=options), student(**model)
    fused_lora.share_adapters(made, small, mapping, **share or {})
    return made, small


def plain_slicing(monkeypatch):
    """From here on parts are autograd's own slices."""
    monkeypatch.setattr(shared_parameters, "accumulates_slices", lambda owner: False)


def loss(*models, x):
    """Something that each model's tokens enter."""
    return sum(model(x).square().sum() for model in models)


def backwards(i):
    """The student's first block goes with the teacher's last."""
    return 3 - i


def named(case):
    """A case's id, the same in every process: functions by their names."""
    return str({key: getattr(value, "__name__", value) for key, value in case.items()})


class TestGradients:
    @pytest.mark.parametrize(
        "case",
        [
            {},
            {"mapping": "first"},
            {"mapping": "last"},
            {"mapping": backwards},
            {"depth": 1},
            {"options": {"targets": ["q", "k", "v"]}},
            {"options": {"targets": ["q", "v"], "scale": 2.0}},
            {"options": {"qkv": "joint"}},
            {"options": {"rank_pattern": {"q": 2, "fc1": 7}}},
            {"share": {"rank": 3}},
            {"embed_dim": 48, "num_heads": 4},
        ],
        ids=named,
    )
    @pytest.mark.parametrize("teacher_last", [False, True])
    def test_plain_slicing_to_the_bit(self, case, teacher_last, monkeypatch):
        models, x = pair(**case), images()
        order = models[::-1] if teacher_last else models

        def steps():
            loss(*order, x=x).backward()
            loss(*order, x=2 * x).backward()  # accumulates
            return grads(models[0])

        mine = steps()
        plain_slicing(monkeypatch)
        assert same(mine, steps())

    def test_the_student_alone(self, monkeypatch):
        (big, small), x = pair(), images()

        def steps():
            for _ in range(2):
                loss(small, x=x).backward()
            return {name: p.grad for name, p in adapters(big).items() if p.grad is not None}

        mine = steps()
        assert len(mine) == 2 * 2 * 6  # blocks, halves, roles
        big.zero_grad()
        plain_slicing(monkeypatch)
        assert same(mine, steps())

    def test_outside_its_part_the_gradient_is_the_teachers(self):
        (big, small), x = pair(), images()
        loss(big, x=x).backward()
        alone = grads(big)
        loss(big, small, x=x).backward()
        name = "blocks.2.attn.qkv.lora_A_k"  # even: block 1 of 2 is block 2 of 4
        both = grads(big)[name]
        assert torch.equal(both[:, 32:], alone[name][:, 32:])
        assert not torch.equal(both[:, :32], alone[name][:, :32])

    def test_blocks_that_share_one_teachers_block(self, monkeypatch):
        big, small = pair(mapping=lambda i: 1, depth=3)
        x = images()
        loss(big, small, x=x).backward()
        mine = grads(big)
        plain_slicing(monkeypatch)
        loss(big, small, x=x).backward()
        assert same(mine, grads(big))

    def test_two_students(self, monkeypatch):
        big, small = pair()
        tiny = student(embed_dim=16, depth=4)
        fused_lora.share_adapters(big, tiny, "first")
        x = images()
        loss(big, small, tiny, x=x).backward()
        mine = grads(big)
        plain_slicing(monkeypatch)
        loss(big, small, tiny, x=x).backward()
        assert same(mine, grads(big))

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointed_blocks(self, reentrant, monkeypatch):
        models, x = pair(), images().requires_grad_()

        def step():
            total = 0.0
            for model in models:
                h = model.norm_pre(model._pos_embed(model.patch_embed(x)))
                for block in model.blocks:
                    h = checkpoint(block, h, use_reentrant=reentrant)
                total = total + h.square().sum()
            total.backward()
            return grads(models[0])

        mine = step()
        plain_slicing(monkeypatch)
        assert same(mine, step())

    def test_dropout_and_a_frozen_half(self, monkeypatch):
        big, small = pair(options={"dropout": 0.3})
        for name, parameter in big.named_parameters():
            parameter.requires_grad_("lora_B" in name)  # LoRA-FA
        small.train()

        def step():
            torch.manual_seed(3)
            loss(big, small, x=images()).backward()
            return grads(big)

        mine = step()
        plain_slicing(monkeypatch)
        assert same(mine, step())

    def test_a_compiled_student_beside_an_eager_teacher(self):
        torch._dynamo.reset()
        big, small = pair(depth=1)
        x, image = torch.randn(2, 17, 32, dtype=torch.float64), images()
        compiled = torch.compile(small.blocks[0], fullgraph=True, backend="aot_eager")
        found = []
        for block in (small.blocks[0], compiled):
            (block(x).square().sum() + loss(big, x=image)).backward()
            found.append(grads(big))
        for name, grad in found[0].items():
            torch.testing.assert_close(found[1][name], grad)

    def test_a_batch_of_none(self):
        big, small = pair()
        loss(big, small, x=images(0)).backward()
        assert not any(grad.any() for grad in grads(big).values())


class Born(TorchDispatchMode):
    """How many tensors of the given sizes come with memory of their own."""

    def __init__(self, sizes):
        super().__init__()
        self.sizes, self.count, self.bytes = sizes, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        def known(values):
            tensors = (t for v in values for t in (v if isinstance(v, list | tuple) else [v]))
            return {t.untyped_storage().data_ptr() for t in tensors if isinstance(t, torch.Tensor)}

        before = known([*args, *(kwargs or {}).values()])
        out = func(*args, **kwargs or {})
        for t in out if isinstance(out, list | tuple) else [out]:
            fresh = isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in before
            if fresh and t.untyped_storage().nbytes() // t.element_size() in self.sizes:
                self.count += 1
                self.bytes += t.untyped_storage().nbytes()
        return out


class TestMemory:
    def born(self, *models, big):
        gc.collect()
        sizes = {p.numel() for p in adapters(big).values()}
        with Born(sizes) as born:
            for _ in range(2):
                loss(*models, x=images(3)).backward()
        grads(big)
        return born.count

    def test_no_temporary_of_the_teachers_size(self, monkeypatch):
        """Beside the teacher's own step and the student's, with copies of its own, nothing."""
        big, small = pair(rank=5)
        apart = copy.deepcopy(nn.ModuleList([big, small]))[1]
        fused_lora.unshare_adapters(apart)
        joint = self.born(big, small, big=big)
        alone = self.born(big, big=big) + self.born(apart, big=big)
        assert joint <= alone
        plain_slicing(monkeypatch)
        assert self.born(big, small, big=big) >= joint + 2 * 2 * 12  # steps, halves, adapters

    def test_the_student_alone_makes_the_teachers_gradient_once(self):
        big, small = pair(rank=5)
        apart = copy.deepcopy(nn.ModuleList([big, small]))[1]
        fused_lora.unshare_adapters(apart)
        made = self.born(small, big=big) - self.born(apart, big=big)
        assert made == 2 * 12  # halves, adapters: .grad itself, in the first of two steps

    def test_no_copy_forward(self):
        _, small = pair()
        linear = small.blocks[1].attn.qkv
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            linear(torch.randn(7, 32, dtype=torch.float64, requires_grad=True))
        owner = linear.shared_adapters["k"].owner
        held = {t.untyped_storage().data_ptr() for t in kept}
        assert owner.lora_A_k.untyped_storage().data_ptr() in held
        assert linear.adapter("k")[1].data_ptr() == owner.lora_B_k.data_ptr()


class TestOneOwner:
    def test_parameters_and_state_dict_hold_each_once(self):
        big, small = pair()
        both = nn.ModuleDict({"teacher": big, "student": small})
        names = [name for name, _ in both.named_parameters() if "lora" in name]
        assert names == [name for name in both.state_dict() if "lora" in name]
        assert all(name.startswith("teacher.") for name in names)
        assert not adapters(small)

    def test_state_dict_round_trip(self):
        first, second = (nn.ModuleList(pair()) for _ in range(2))
        second.load_state_dict(first.state_dict())
        x = images()
        assert all(torch.equal(m(x), n(x)) for m, n in zip(first, second, strict=True))

    def test_safetensors(self, tmp_path):
        from safetensors.torch import load_model, save_model

        first, second = (nn.ModuleList(pair()) for _ in range(2))
        save_model(first, str(tmp_path / "pair.safetensors"))
        load_model(second, str(tmp_path / "pair.safetensors"))
        assert torch.equal(first[1](images(1) * 0 + 1), second[1](images(1) * 0 + 1))

    def test_one_optimizer_moves_both(self):
        big, small = pair()
        x = images()
        before = big(x), small(x)
        optimizer = torch.optim.AdamW(adapters(big).values(), lr=0.1)
        loss(big, small, x=x).backward()
        optimizer.step()
        assert not torch.equal(big(x), before[0])
        assert not torch.equal(small(x), before[1])

    @pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies_of_the_pair_share_among_themselves(self, twin):
        both, x = nn.ModuleList(pair()[::-1]), images()  # the student first
        loss(*both, x=x).backward()
        both.zero_grad()
        other = twin(both)
        loss(*both, x=x).backward()
        loss(*other, x=x).backward()
        assert same(grads(both[1]), grads(other[1]))
        with torch.no_grad():
            [p.zero_() for p in adapters(other[1]).values()]
        assert not torch.equal(other[0](x), both[0](x))

    def test_a_change_of_the_teachers_is_the_students(self):
        big, small = pair()
        x = images()
        before = small(x)
        with torch.no_grad():
            big.blocks[2].mlp.fc1.lora_B.add_(1)
        assert not torch.equal(small(x), before)


def train(big, *models, x):
    """One step of the teacher's adapters, through all of the models."""
    optimizer = torch.optim.SGD([p for m in (big, *models) for p in m.parameters()], lr=0.05)
    loss(big, *models, x=x).backward()
    optimizer.step()
    optimizer.zero_grad()


AVERAGES = {
    "timm's EMA": (lambda m: ModelEmaV3(m, decay=0), lambda ema, m: ema.update(m)),
    "timm's second": (lambda m: ModelEmaV2(m, decay=0), lambda ema, m: ema.update(m)),
    "torch's SWA": (
        lambda m: AveragedModel(m, avg_fn=lambda mean, new, count: new),
        lambda ema, m: [ema.update_parameters(m) for _ in range(2)],
    ),
    "a checkpoint": (
        lambda m: nn.ModuleList([copy.deepcopy(m)]),
        lambda ema, m: ema[0].load_state_dict(m.state_dict()),
    ),
}


class TestAverages:
    """Copies that are kept up with the student they were made of."""

    @pytest.mark.parametrize("kind", AVERAGES)
    def test_of_a_student_alone_are_refused_once_they_would_be_stale(self, kind):
        make, update = AVERAGES[kind]
        big, small = pair()
        x = images()
        ema, before = make(small), small(x).detach()
        inner = next(m for m in ema.modules() if type(m) is type(small))
        torch.testing.assert_close(inner(x).detach(), before)  # as long as it is only a copy
        train(big, small, x=x)
        torch.testing.assert_close(inner(x).detach(), before)
        update(ema, small)
        with pytest.raises(RuntimeError, match=r"as an average \(EMA\).*with its teacher"):
            inner(x)
        assert small(x).isfinite().all()

    @pytest.mark.parametrize("kind", AVERAGES)
    def test_of_both_are_those_of_both(self, kind):
        make, update = AVERAGES[kind]
        both, x = nn.ModuleList(pair()), images()
        ema = make(both)
        inner = next(m for m in ema.modules() if type(m) is nn.ModuleList and len(m) == 2)
        train(*both, x=x)
        update(ema, both)
        for mine, theirs in zip(inner, both, strict=True):
            torch.testing.assert_close(mine(x), theirs(x))

    @pytest.mark.parametrize("kind", AVERAGES)
    def test_of_a_student_with_copies_of_its_own(self, kind):
        make, update = AVERAGES[kind]
        _, small = pair()
        fused_lora.unshare_adapters(small)
        ema, x = make(small), images()
        inner = next(m for m in ema.modules() if type(m) is type(small))
        train(small, x=x)
        update(ema, small)
        torch.testing.assert_close(inner(x), small(x))

    def test_a_checkpoint_into_the_student_itself_is_no_average(self):
        big, small = pair()
        x = images()
        y = small(x)
        small.load_state_dict({k: v.clone() for k, v in small.state_dict().items()})
        torch.testing.assert_close(small(x), y)
        assert big(x).isfinite().all()


class TestTheStudentAlone:
    @pytest.mark.parametrize("qkv", ["separate", "joint"])
    def test_it_computes_with_the_first_dimensions(self, qkv):
        big, small = pair(options={"qkv": qkv})
        x = torch.randn(3, 32, dtype=torch.float64)
        linear, owner = small.blocks[1].attn.qkv, big.blocks[2].attn.qkv
        y = nn.functional.linear(x, linear.weight, linear.bias)
        for i, part in enumerate("qkv"):
            a, b = owner.adapter(part if qkv == "separate" else "")
            first = 48 * i if qkv == "joint" else 0
            y[:, 32 * i : 32 * i + 32] += x @ a[:, :32].T @ b[first : first + 32].T
        torch.testing.assert_close(linear(x), y)

    def test_the_halves_of_a_packed_gate_apart(self):
        big, small = teacher(mlp_layer=GluMlp), student(mlp_layer=GluMlp)
        fused_lora.share_adapters(big, small, "first")
        x = torch.randn(3, 32, dtype=torch.float64)
        linear, (a, b) = small.blocks[1].mlp.fc1, big.blocks[1].mlp.fc1.adapter()
        half, tall = linear.out_features // 2, len(b) // 2
        y = nn.functional.linear(x, linear.weight, linear.bias)
        y[:, :half] += x @ a[:, :32].T @ b[:half].T
        y[:, half:] += x @ a[:, :32].T @ b[tall : tall + half].T
        torch.testing.assert_close(linear(x), y)

    def test_saved_and_loaded_into_a_patched_one(self, tmp_path):
        _, small = pair(options={"scale": 0.5})
        twin, x = student(), images()
        twin.load_state_dict(small.state_dict())
        fused_lora.save(small, tmp_path)
        fused_lora.patch(twin, rank=4, adapter_dtype=torch.float64)
        fused_lora.load(twin, tmp_path)
        torch.testing.assert_close(twin(x), small(x))

    def test_merge_and_unmerge(self):
        _, small = pair()
        x = images()
        before, bits = small(x), small.blocks[0].mlp.fc1.weight.detach().clone()
        fused_lora.merge(small.eval())
        torch.testing.assert_close(small(x), before)
        fused_lora.unmerge(small)
        assert torch.equal(small.blocks[0].mlp.fc1.weight, bits)

    @pytest.mark.parametrize("options", [{}, {"qkv": "joint"}, {"targets": ["q"]}])
    def test_unshared_it_owns_what_it_computes_with(self, options):
        big, small = pair(options=options)
        x = images()
        before = small(x)
        fused_lora.unshare_adapters(small)
        assert torch.equal(small(x), before)
        assert adapters(small)
        with torch.no_grad():
            [p.zero_() for p in adapters(big).values()]
        assert torch.equal(small(x), before)
        loss(small, x=x).backward()
        assert not any(p.grad is not None for p in adapters(big).values())
        fused_lora.unpatch(big)
        fused_lora.unpatch(small)

    def test_unpatched_it_is_what_it_was(self):
        big, small = teacher(), student()
        small.head.weight.requires_grad_(False)
        x = images()
        state = {name: (id(p), p.requires_grad) for name, p in small.named_parameters()}
        before = small(x)
        fused_lora.share_adapters(big, small, trainable="^norm")
        assert {name.partition(".")[0] for name in adapters(small)} == {"norm"}
        fused_lora.unpatch(small)
        assert torch.equal(small(x), before)
        now = {name: (id(p), p.requires_grad) for name, p in small.named_parameters()}
        assert now == state
        assert not any(isinstance(m, SharedLoRALinear) for m in small.modules())

    def test_unpatched_with_its_adapters_merged_it_computes_the_same(self):
        big, small = pair()
        x = images()
        before = small(x)
        fused_lora.unpatch(small, merge=True)
        torch.testing.assert_close(small(x), before)
        assert not any(isinstance(m, SharedLoRALinear) for m in small.modules())
        fused_lora.unpatch(big)

    def test_disabled(self):
        big, small = teacher(), student()
        x = images()
        base = small(x)
        fused_lora.share_adapters(big, small)
        assert not torch.equal(small(x), base)
        with fused_lora.disable(small):
            assert torch.equal(small(x), base)

    def test_explain_and_report(self):
        _, small = pair()
        assert "blocks.0.attn.qkv" in fused_lora.explain(small)
        assert "shared" in repr(small)


@pytest.mark.parametrize("layer", [SwiGLU, GluMlp])
def test_gated_mlps(layer, monkeypatch):
    big, small = teacher(mlp_layer=layer), student(mlp_layer=layer)
    fused_lora.share_adapters(big, small)
    fc1 = small.blocks[0].mlp.fc1 if layer is GluMlp else small.blocks[0].mlp.fc1_x
    parts = ["fc1", "fc1_2"] if layer is GluMlp else [""]
    assert list(fc1.groups) == parts
    x = images()
    loss(big, small, x=x).backward()
    mine = grads(big)
    plain_slicing(monkeypatch)
    loss(big, small, x=x).backward()
    assert same(mine, grads(big))


def test_separate_projections_serve_a_fused_qkv(monkeypatch):
    big, small = teacher(separate=True), student()
    fused_lora.share_adapters(big, small)
    shared_adapters = small.blocks[1].attn.qkv.shared_adapters
    owners = [getattr(big.blocks[2].attn, f"{part}_proj") for part in "qkv"]
    assert [loan.owner for loan in shared_adapters.values()] == owners
    assert all(loan.first == 0 for loan in shared_adapters.values())
    x = images()
    loss(big, small, x=x).backward()
    mine = grads(big)
    plain_slicing(monkeypatch)
    loss(big, small, x=x).backward()
    assert same(mine, grads(big))


def test_nothing_is_left_of_a_step_that_failed():
    big, small = pair()
    x = images()
    handle = big.blocks[1].register_full_backward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss(big, small, x=x).backward()
    handle.remove()
    big.zero_grad()
    loss(big, small, x=x).backward()
    mine = grads(big)
    assert not shared_parameters._passes
    loss(big, small, x=x).backward()
    assert same(mine, grads(big))


def test_a_student_s_base_is_in_fp8_as_its_teacher_s():
    made, small = pair(options={"base_dtype": "fp8"})
    shared = [m for m in small.modules() if isinstance(m, SharedLoRALinear)]
    rows = small.__dict__["_fused_lora_report"].rows
    assert shared and all("fp8/" in row.plan for row in rows)
    x = images()
    loss(made, small, x=x).backward()
    assert all(p.grad.isfinite().all() for p in adapters(made).values())
    y = small(x)
    fused_lora.unshare_adapters(small)
    assert torch.equal(small(x), y) and all(m._codes is not None for m in shared)
    fused_lora.unpatch(small)
    assert not any("_codes" in vars(m) for m in small.modules())
