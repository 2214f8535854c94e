"""torch.func, forward-mode differentiation and tracing: the equation spelled out, same numbers."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vmap

from fused_lora.nn import FusedLoRAGroupedLinear, FusedLoRALinear
from tests.patching.models import wake
from tests.stacks.sample import batch, close, gradients, loss_of, patched, trained


def layer(**options):
    torch.manual_seed(0)
    spans = {"q": (0, 5), "v": (10, 15)}
    module = FusedLoRAGroupedLinear(7, 15, spans=spans, rank=3, dtype=torch.float64, **options)
    return wake(module.double())


def by_hand(module, x):
    y = torch.nn.functional.linear(x, module.weight, module.bias)
    for (a, b), s, span in zip(
        module.adapters(), module.scales, module.groups.values(), strict=True
    ):
        columns = torch.arange(span.start, span.stop)
        y = y.index_add(-1, columns, s * (x @ a.T) @ b.T)
    return y


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"mid": "full"}], ids=str)
def test_gradients_by_functional_call(options):
    model = patched(**options)
    expected = gradients(model)
    frozen = {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad}
    parameters = {name: p.detach() for name, p in trained(model).items()}

    def loss(parameters):
        return loss_of(lambda x: functional_call(model, parameters | frozen, (x,)), *batch())

    close(grad(loss)(parameters), expected)


def test_a_gradient_per_sample():
    model, (x, labels) = patched(), batch()
    parameters = {name: p.detach() for name, p in trained(model).items()}

    def loss(parameters, x, label):
        one = functional_call(model, parameters, (x[None],))
        return torch.nn.functional.cross_entropy(one, label[None])

    found = vmap(grad(loss), (None, 0, 0))(parameters, x, labels)
    close({name: g.mean(0) for name, g in found.items()}, gradients(model))


def test_an_ensemble_of_adapters():
    models, x = [layer(), layer()], torch.randn(6, 7, dtype=torch.float64)
    wake(models[1], std=0.2)
    parameters, _ = stack_module_state(models)
    y = vmap(lambda p: functional_call(models[0], p, (x,)))(parameters)
    for i, model in enumerate(models):
        torch.testing.assert_close(y[i], model(x))


def test_derivatives_of_every_kind():
    module, x = layer(), torch.randn(3, 7, dtype=torch.float64)
    tangent = torch.randn_like(x)

    def ours(x):
        return module(x).sin().sum()

    def theirs(x):
        return by_hand(module, x).sin().sum()

    torch.testing.assert_close(jacrev(ours)(x), jacrev(theirs)(x))
    torch.testing.assert_close(hessian(ours)(x), hessian(theirs)(x))
    torch.testing.assert_close(jvp(ours, (x,), (tangent,)), jvp(theirs, (x,), (tangent,)))
    with torch.autograd.forward_ad.dual_level():
        dual = module(torch.autograd.forward_ad.make_dual(x, tangent))
        found = torch.autograd.forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(found, jvp(lambda x: by_hand(module, x), (x,), (tangent,))[1])


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14),
    reason="torch 2.9 to 2.13 compile no registered op inside a transform",
)
def test_a_transform_inside_a_compiled_function():
    module, x = layer(), torch.randn(3, 7, dtype=torch.float64)

    def run(x):
        return grad(lambda x: module(x).sin().sum())(x)

    torch.testing.assert_close(torch.compile(run, backend="aot_eager")(x), run(x))


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_dropout_under_vmap_follows_vmaps_rule(randomness):
    module, x = layer(dropout=0.5).train(), torch.ones(8, 4, 7, dtype=torch.float64)
    y = vmap(module, randomness=randomness)(x)
    assert all(torch.equal(y[0], each) for each in y) == (randomness == "same")


def test_jit_trace():
    model, (x, _) = patched().eval(), batch()
    with pytest.warns(torch.jit.TracerWarning):
        traced = torch.jit.trace(model, (x,), check_trace=False)
    torch.testing.assert_close(traced(x), model(x))


def test_plain_path_is_left_again():
    module, x = FusedLoRALinear(7, 5, rank=2), torch.randn(3, 7)
    grad(lambda x: module(x).sum())(x)
    assert type(module(x).grad_fn).__name__ == "LoRAProgramBackward"
