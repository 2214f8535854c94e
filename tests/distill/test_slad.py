"""The joint step, its phases, and the same step in plain torch."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fused_lora.distill.heads import ClassificationHead, SegmentationHead
from fused_lora.distill.slad import (
    IGNORE,
    JOINT,
    STUDENT_ONLY,
    TEACHER_ONLY,
    Logits,
    Terms,
    prepare,
    slad_losses,
)
from fused_lora.nn import AdaptedLinear
from fused_lora.patching.report import PatchError
from fused_lora.testing.yardstick import in_every_order, judge
from tests.patching.models import build

CLASSES = 5


def slad(method="joint", head=ClassificationHead, dtype=torch.float64, **options):
    """A teacher of four blocks of width 48, a student of three of width 32."""
    torch.manual_seed(0)
    big, small = build(depth=4), build(depth=3, embed_dim=32, num_heads=2)
    heads = head(48, CLASSES), head(32, CLASSES)
    options = {"rank": 4, "seed": 0} | options
    module, phases = prepare(big.to(dtype), small.to(dtype), *heads, method, **options)
    return module.to(dtype).train(), phases


def batch(dtype=torch.float64, segmentation=False):
    shape = (6, 32, 32) if segmentation else (6,)
    labels = torch.randint(CLASSES, shape)
    return torch.randn(6, 3, 32, 32, dtype=dtype), labels


class TestLoss:
    def logits(self, *shape):
        return Logits(
            *(torch.randn(*shape, dtype=torch.float64).requires_grad_() for _ in range(2))
        )

    def test_the_equation(self):
        s, t = logits = self.logits(6, CLASSES)
        labels = torch.randint(CLASSES, (6,))
        terms = Terms(0.3, 0.7, 1.5, temperature=3.0)
        p_t, p_s = (t / 3).softmax(1), (s / 3).softmax(1)
        kl = (p_t * (p_t / p_s).log()).sum(1).mean()
        ce = [-z.softmax(1)[range(6), labels].log().mean() for z in (s, t)]
        got = slad_losses(logits, labels, terms)
        torch.testing.assert_close(got.total, 0.3 * ce[0] + 0.7 * ce[1] + 1.5 * 9 * kl)
        torch.testing.assert_close(torch.stack(got[1:]), torch.stack([*ce, 9 * kl]))

    @pytest.mark.parametrize("into_teacher", [False, True])
    def test_who_learns_from_the_agreement(self, into_teacher):
        s, t = logits = self.logits(6, CLASSES)
        terms = Terms(0, 0, 1, into_teacher=into_teacher)
        slad_losses(logits, torch.randint(CLASSES, (6,)), terms).total.backward()
        assert s.grad is not None
        assert (t.grad is not None) == into_teacher

    def test_pixels_that_do_not_count(self):
        s, t = logits = self.logits(2, CLASSES, 4, 4)
        labels = torch.randint(CLASSES, (2, 4, 4))
        labels[:, :2] = IGNORE
        got = slad_losses(logits, labels)
        cut = Logits(s[:, :, 2:], t[:, :, 2:])
        torch.testing.assert_close(got, slad_losses(cut, labels[:, 2:]))

    @pytest.mark.parametrize(
        ("weights", "message"),
        [
            ({"student": -1}, r"not negative and not all 0, got \(-1, 1.0, 1.0\)"),
            ({"teacher": float("nan")}, "must be finite"),
            ({"student": 0, "teacher": 0, "agreement": 0}, r"got \(0, 0, 0\)"),
            ({"temperature": 0}, "temperature must be above 0, got 0"),
            ({"temperature": float("inf")}, "got inf"),
        ],
    )
    def test_bad_terms(self, weights, message):
        with pytest.raises(ValueError, match=message):
            Terms(**weights)

    @pytest.mark.parametrize(
        ("student", "teacher", "labels", "message"),
        [
            (None, (6, 5), (6,), "the loss reads the student's logits, but there are none"),
            ((6, 5), None, (6,), "reads the teacher's"),
            ((6, 5), (7, 5), (6,), r"the teacher's logits are \(7, 5\), the labels \(6,\)"),
            ((6, 5, 4, 4), (6, 5, 4, 4), (6, 8, 8), r"student's logits are \(6, 5, 4, 4\)"),
            ((6, 5), (6, 4), (6,), r"disagree on the shape of their logits: \[\(6, 5\), \(6, 4\)"),
        ],
    )
    def test_bad_logits(self, student, teacher, labels, message):
        made = [None if shape is None else torch.zeros(shape) for shape in (student, teacher)]
        with pytest.raises(ValueError, match=message):
            slad_losses(Logits(*made), torch.zeros(labels, dtype=torch.int64))


def naively(module):
    """A copy that computes with plain torch, and shares by autograd's own slicing."""
    twin = copy.deepcopy(module)
    for each in twin.modules():
        if isinstance(each, AdaptedLinear):
            each.forward = functools.partial(_naive, each)
    return twin


def _naive(linear, x):
    y = F.linear(x, linear.weight, linear.bias)
    terms = []
    for s, (name, span) in zip(linear.scales, linear.groups.items(), strict=True):
        a, b = linear.adapter(name)
        terms.append(F.pad(s * ((x @ a.T) @ b.T), (span.start, y.shape[-1] - span.stop)))
    return y + sum(terms)


def train(module, batches, steps, optimizer):
    """The losses of each step, [steps, terms]."""
    chosen = optimizer(module.trained())
    found = []
    for step in range(steps):
        images, labels = batches[step % len(batches)]
        losses = module.losses(module(images), labels)
        chosen.zero_grad()
        losses.total.backward()
        chosen.step()
        found.append(torch.stack([term.detach() for term in losses if term is not None]))
    return torch.stack(found)


class TestAgainstPlainTorch:
    @pytest.mark.parametrize("head", [ClassificationHead, SegmentationHead])
    def test_float64_step_for_step(self, head):
        module, _ = slad(head=head)
        twin = naively(module)
        batches = [batch(segmentation=head is SegmentationHead) for _ in range(3)]
        optimizer = functools.partial(torch.optim.AdamW, lr=3e-3)
        mine, theirs = (train(m, batches, 6, optimizer) for m in (module, twin))
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=0)

    def test_it_learns(self):
        module, _ = slad()
        losses = train(module, [batch()], 20, functools.partial(torch.optim.AdamW, lr=3e-3))
        assert losses[-1, 0] < losses[0, 0] / 2

    def test_fp32_step_for_step(self):
        fused, _ = slad(dtype=torch.float32, adapter_dtype=torch.float32)
        naive, truth = naively(fused), naively(fused).double()
        batches = [batch(torch.float32) for _ in range(3)]
        wide = [(images.double(), labels) for images, labels in batches]
        optimizer = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)
        mine = train(fused, batches, 6, optimizer)
        theirs = in_every_order(lambda: train(copy.deepcopy(naive), batches, 6, optimizer))
        exact = train(truth, wide, 6, optimizer)
        for step in range(6):
            plain = [run[step] for run in theirs]
            verdict = judge(f"step {step}", mine[step], plain, exact[step], torch.float32)
            assert verdict.passed, str(verdict)


class TestPhases:
    def moved(self, method, phase):
        """Which of the four parts a step of the phase changes."""
        module, phases = slad(method)
        module.begin(phases[phase])
        parts = {"teacher", "teacher_head", "student", "student_head"}
        before = {part: copy.deepcopy(getattr(module, part).state_dict()) for part in parts}
        train(module, [batch()], 2, functools.partial(torch.optim.SGD, lr=0.1))
        after = {part: getattr(module, part).state_dict() for part in parts}
        return {p for p in parts if any((before[p][k] != after[p][k]).any() for k in before[p])}

    @pytest.mark.parametrize(
        ("method", "phase", "moves"),
        [
            ("joint", 0, {"teacher", "teacher_head", "student_head"}),
            ("two_step", 0, {"teacher", "teacher_head"}),
            ("two_step", 1, {"student", "student_head"}),
            ("probe", 0, {"teacher_head"}),
            ("probe", 1, {"student", "student_head"}),
            ("finetune", 0, {"teacher", "teacher_head"}),
            ("finetune", 1, {"student", "student_head"}),
        ],
    )
    def test_what_moves(self, method, phase, moves):
        assert self.moved(method, phase) == moves

    def test_the_phases(self):
        assert slad("joint")[1] == (JOINT,)
        for method in ("two_step", "probe", "finetune"):
            assert slad(method)[1] == (TEACHER_ONLY, STUDENT_ONLY)
        assert (STUDENT_ONLY.student, STUDENT_ONLY.agreement) == (0.5, 0.5)

    def test_a_shared_student_alone_trains_what_it_shares(self):
        module, _ = slad("joint", mapping="first")
        module.begin(STUDENT_ONLY)
        shared = {id(p) for p in module.trained()} & {id(p) for p in module.teacher.parameters()}
        assert len(shared) == 3 * 3 * 2  # the student's blocks; q, k, v; halves
        assert module.student.training and not module.teacher.training

    def test_what_a_phase_does_not_train_is_in_eval_mode(self):
        module, _ = slad("two_step", head=SegmentationHead)
        modes = lambda: [m.training for m in (module.teacher_head, module.student_head)]  # noqa: E731
        assert modes() == [True, False]
        module.begin(STUDENT_ONLY)
        assert modes() == [False, True]
        mean = module.teacher_head.norm.running_mean.clone()
        logits = module(batch()[0])
        assert torch.equal(module.teacher_head.norm.running_mean, mean)
        assert not logits.teacher.requires_grad
        assert logits.student.requires_grad
        module.eval()
        assert modes() == [False, False]
        module.train()
        assert modes() == [False, True]

    def test_one_forward_per_model_that_the_loss_reads(self):
        module, _ = slad("two_step")
        assert module(batch()[0]).student is None
        module.begin(Terms(1, 0, 0))
        assert module(batch()[0]).teacher is None

    def test_one_state_dict_holds_each_parameter_once(self):
        module, _ = slad("joint")
        state = module.state_dict()
        assert sum("lora" in name for name in state) == 4 * 3 * 2
        twin, _ = slad("joint")
        with torch.no_grad():
            [p.normal_() for p in twin.parameters()]
        twin.load_state_dict(state)
        images, _ = batch()
        assert all(map(torch.equal, module.eval()(images), twin.eval()(images)))
        assert len({id(p) for p in module.trained()}) == len(module.trained())


class TestPrepare:
    def test_an_unknown_method(self):
        with pytest.raises(ValueError, match=r"one of \('joint', .*, got 'both'"):
            slad("both")

    @pytest.mark.parametrize("method", ["joint", "two_step"])
    def test_a_student_that_cannot_have_adapters(self, method):
        big, small = build(), nn.Sequential(nn.Linear(3, 3))
        before = [(type(m), m.training) for m in big.modules()]
        trains = [p.requires_grad for p in big.parameters()]
        with pytest.raises(PatchError, match="Sequential"):
            prepare(big, small, ClassificationHead(48, 2), ClassificationHead(3, 2), method)
        assert [(type(m), m.training) for m in big.modules()] == before
        assert [p.requires_grad for p in big.parameters()] == trains
