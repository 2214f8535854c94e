"""Parts of parameters as operands: autograd's gradients, without its padding."""

import gc

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fused_lora.nn import shared_parameters
from fused_lora.nn.shared_parameters import ParameterSlice, parameter_slices

WHOLE, SMALL, SMALLER, LOW = (
    ParameterSlice(0, 6, 9),
    ParameterSlice(0, 4, 5),
    ParameterSlice(0, 2, 3),
    ParameterSlice(4, 6, 7),
)


@pytest.fixture
def owner():
    yield nn.Parameter(torch.randn(6, 9, dtype=torch.float64))
    gc.collect()
    assert not shared_parameters._passes, "a backward pass left something behind"


def sliced(owners, boxes):
    """What autograd would do."""
    return [box.of(owner) for owner, box in zip(owners, boxes, strict=True)]


def use(part, x):
    """A little of what a layer does with a part."""
    return (x[..., : part.shape[1]] @ part.T).tanh().square().sum()


def loss(owner, boxes, x, take=parameter_slices):
    """One use of each box, one after the other."""
    return sum(use(take([owner], [box])[0], x) for box in boxes)


@pytest.fixture
def x():
    return torch.randn(7, 9, dtype=torch.float64)


@pytest.mark.parametrize(
    "boxes",
    [
        (WHOLE,),
        (SMALL,),
        (WHOLE, SMALL),
        (SMALL, WHOLE),
        (SMALL, WHOLE, SMALLER, LOW),
        (WHOLE, SMALL, SMALLER, SMALL),
        (SMALLER, LOW, SMALL, WHOLE, WHOLE),
        (LOW, SMALL),
    ],
)
def test_the_gradient_is_autograds_to_the_bit(owner, x, boxes):
    def runs(take):
        handed = torch.autograd.grad(loss(owner, boxes, x, take), owner)
        for _ in range(2):  # the second pass accumulates
            loss(owner, boxes, x, take).backward()
        handed += torch.autograd.grad(loss(owner, boxes, x, take), owner)  # and this does not
        total, owner.grad = owner.grad, None
        return *handed, total

    assert all(map(torch.equal, runs(parameter_slices), runs(sliced)))


def test_several_parts_at_once_and_the_same_twice(owner, x):
    other = nn.Parameter(torch.randn(6, 9, dtype=torch.float64))
    owners = [owner, other, owner, owner, owner]
    boxes = [SMALL, WHOLE, SMALL, LOW, SMALL]

    def grads(take):
        parts = take(owners, boxes)
        total = sum(i * use(part, x) for i, part in enumerate(parts, 1))
        return torch.autograd.grad(total, [owner, other])

    assert all(map(torch.equal, grads(parameter_slices), grads(sliced)))


def test_parts_are_views(owner):
    (part,) = parameter_slices([owner], [LOW])
    assert part.data_ptr() == owner[4:6].data_ptr()
    assert part.shape == (2, 7)


@pytest.mark.parametrize("foreign", ["sum", "product", "expand"])
def test_uses_that_are_not_borrowed_are_added(owner, x, foreign):
    def total(take):
        term = {"sum": owner.sum(), "product": (owner * 3).sin().sum(), "expand": owner[0, 0]}
        return loss(owner, (WHOLE, SMALL), x, take) + term[foreign]

    got = torch.autograd.grad(total(parameter_slices), owner)
    torch.testing.assert_close(got, torch.autograd.grad(total(sliced), owner), rtol=0, atol=1e-14)


def test_a_gradient_that_another_leaf_gets_too_is_not_written_to(owner, x):
    twin = nn.Parameter(owner.detach().clone())
    (loss(owner, (SMALL,), x) + (owner + twin).square().sum()).backward()
    expected = torch.autograd.grad((owner.detach() + twin).square().sum(), twin)
    assert torch.equal(twin.grad, *expected)


def test_nothing_to_train(owner, x):
    owner.requires_grad_(False)
    assert not loss(owner, (SMALL, WHOLE), x).requires_grad
    owner.requires_grad_(True)
    with torch.no_grad():
        assert not loss(owner, (SMALL,), x).requires_grad


def test_an_owner_that_is_no_leaf(owner, x):
    got = torch.autograd.grad(loss(owner * 2, (SMALL, WHOLE), x), owner)
    assert all(
        map(
            torch.equal, got, torch.autograd.grad(loss(owner * 2, (SMALL, WHOLE), x, sliced), owner)
        )
    )


def test_a_pass_that_asks_for_another_gradient_leaves_nothing(owner, x):
    x.requires_grad_()
    for _ in range(2):
        total = loss(owner, (SMALL, WHOLE), x)
        (dx,) = torch.autograd.grad(total, x, retain_graph=True)
        total.backward(inputs=[x], retain_graph=True)
        assert owner.grad is None
        assert torch.equal(x.grad, dx)
        x.grad = None
    total.backward()
    expected = torch.autograd.grad(loss(owner, (SMALL, WHOLE), x, sliced), owner)
    assert torch.equal(owner.grad, *expected)


def test_a_pass_that_fails_leaves_nothing(owner, x):
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            return t.clone()

        @staticmethod
        def backward(ctx, grad):
            raise ZeroDivisionError

    first = use(Fails.apply(parameter_slices([owner], [WHOLE])[0]), x)  # its backward comes last
    with pytest.raises(ZeroDivisionError):
        (first + loss(owner, (SMALL,), x)).backward()
    assert owner.grad is None
    loss(owner, (SMALL,), x).backward()
    assert torch.equal(owner.grad, *torch.autograd.grad(loss(owner, (SMALL,), x, sliced), owner))


def test_backward_twice_through_one_graph(owner, x):
    total = loss(owner, (WHOLE, SMALL), x)
    total.backward(retain_graph=True)
    once = owner.grad.clone()
    total.backward()
    assert torch.equal(owner.grad, 2 * once)


def test_double_backward_fails_loudly(owner, x):
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        torch.autograd.grad(loss(owner, (SMALL,), x), owner, create_graph=True)


def test_the_owner_may_be_out_of_sight(x):
    held = nn.Parameter(torch.randn(6, 9, dtype=torch.float64))
    seen = []
    held.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    expected = torch.autograd.grad(loss(held, (SMALL, LOW), x, sliced), held)
    total = loss(held, (SMALL, LOW), x)
    del held
    gc.collect()
    total.backward()
    assert torch.equal(*seen, *expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(owner, x, reentrant):
    x.requires_grad_()

    def total(take):
        inner = checkpoint(lambda x: loss(owner, (SMALL, LOW), x, take), x, use_reentrant=reentrant)
        return inner + loss(owner, (WHOLE,), x, take)

    grads = []
    for take in (parameter_slices, sliced):
        total(take).backward()
        grads.append(owner.grad)
        owner.grad = None
    assert torch.equal(*grads)


def test_a_part_alone_is_added_in_place_to_the_gradient_there_is(owner, x):
    loss(owner, (SMALL,), x).backward()
    held, once = owner.grad, owner.grad.clone()
    seen = []
    owner.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    loss(owner, (SMALL,), x).backward()
    assert owner.grad is held
    assert torch.equal(held, 2 * once)
    assert torch.equal(*seen, held)


def test_moving_the_owner_to_another_dtype(owner, x):
    module = nn.Module()
    module.p = owner
    loss(owner, (SMALL,), x).backward()
    module.zero_grad()
    module.to(torch.float32)
    loss(module.p, (SMALL, WHOLE), x.float()).backward()
    expected = torch.autograd.grad(loss(module.p, (SMALL, WHOLE), x.float(), sliced), module.p)
    assert torch.equal(module.p.grad, *expected)


def test_writing_to_the_owner_between_forward_and_backward_is_noticed(owner, x):
    total = loss(owner, (SMALL,), x.requires_grad_())
    with torch.no_grad():
        owner.add_(1)
    with pytest.raises(RuntimeError, match="modified (by an )?inplace"):
        total.backward()


def test_a_sharded_owner():
    class Sharded(torch.Tensor):
        device_mesh = "a mesh"

    with pytest.raises(TypeError, match=r"Sharded \(6, 9\) is sharded over a mesh"):
        parameter_slices([torch.randn(6, 9).as_subclass(Sharded)], [SMALL])


@pytest.mark.gpu
def test_uses_on_two_streams():
    owner = nn.Parameter(torch.randn(512, 4096, device="cuda"))
    x = torch.randn(4096, 4096, device="cuda")
    box = ParameterSlice(0, 256, 2048)
    torch.cuda.synchronize()
    got = []
    for take in (parameter_slices, sliced):
        side = torch.cuda.Stream()
        total = loss(owner, (WHOLE.all_of(owner),), x, take)
        with torch.cuda.stream(side):
            total = total + loss(owner, (box, box), x, take)
        got += torch.autograd.grad(total, owner)
        torch.cuda.synchronize()
    torch.testing.assert_close(*got)
