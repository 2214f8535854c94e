"""Loops people write: accumulation, checkpointing, loss scaling, averaging, autocast."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.stacks.sample import batch, close, gradients, loss_of, patched, train, trained


def test_accumulated_halves_are_the_whole():
    model, (x, labels) = patched(), batch()
    expected = gradients(model)
    model.zero_grad()
    for half in (slice(0, 2), slice(2, 4)):
        (loss_of(model, x[half], labels[half]) / 2).backward()
    close({name: p.grad for name, p in trained(model).items()}, expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_changes_no_gradient(use_reentrant, dropout):
    model, (x, labels) = patched(dropout=dropout), batch()
    x.requires_grad_(use_reentrant)  # the reentrant kind wants an input that needs a gradient
    torch.manual_seed(3)
    loss_of(model, x, labels).backward()
    expected = {name: p.grad.clone() for name, p in trained(model).items()}
    model.zero_grad()
    torch.manual_seed(3)
    y = checkpoint(model, x, use_reentrant=use_reentrant)
    torch.nn.functional.cross_entropy(y, labels).backward()
    close({name: p.grad for name, p in trained(model).items()}, expected)


def test_checkpointing_by_the_model_itself():
    model = patched()
    expected = gradients(model)
    model.set_grad_checkpointing(True)
    close(gradients(model), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_grad_scaler_steps_and_skips(dtype):
    model, scaler = patched(), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.1)
    expected = gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", dtype):
        loss = loss_of(model, *batch())
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    found = {name: p.grad.clone() for name, p in trained(model).items()}
    for name, value in expected.items():
        assert found[name].dtype is torch.float32
        error = (found[name] - value).norm() / value.norm()
        assert error < 8 * torch.finfo(dtype).eps, f"{name}: {error}"
    before = {name: p.detach().clone() for name, p in trained(model).items()}
    trained(model)["head.weight"].grad[0, 0] = torch.inf
    scaler._per_optimizer_states.clear()  # as if unscale_ had not been called
    scaler.step(optimizer)
    scaler.update()
    close(dict(trained(model)), before, rtol=0, atol=0)  # an overflow changes nothing
    assert scaler.get_scale() == 2.0**9


def test_an_average_of_the_weights_follows():
    model = patched()
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    first = {name: p.detach().clone() for name, p in trained(model).items()}
    last = train(model)
    average.update_parameters(model)
    found = {name.removeprefix("module."): p for name, p in trained(average).items()}
    close(found, {name: (first[name] + last[name]) / 2 for name in first})


def test_a_copy_in_mid_training_goes_on_alike():
    model = patched()
    train(model)
    twin = copy.deepcopy(model)
    close(train(twin), train(model), rtol=0, atol=0)


def test_loraplus_groups_and_gradient_hooks_reach_every_adapter():
    model = patched()
    expected = gradients(model)
    hooks = [p.register_hook(lambda g: 3 * g) for n, p in trained(model).items() if "lora_B" in n]
    found = gradients(model)
    close(found, {n: 3 * g if "lora_B" in n else g for n, g in expected.items()})
    for hook in hooks:
        hook.remove()
    close(gradients(model), expected)
