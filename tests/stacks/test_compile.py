"""torch.compile of a whole patched ViT: one graph, one recompilation for no reason at all."""

from __future__ import annotations

import pytest
import torch

import fused_lora
from fused_lora.nn import AdaptedLinear
from tests.stacks.sample import batch, close, gradients, patched, trained

BATCHES = (2, 5, 3, 8, 7)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_one_graph_serves_every_batch_size_and_scale(backend):
    model = patched(depth=1)
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    gradients(compiled)  # compiles, forward and backward
    for i, count in enumerate(BATCHES):
        for module in model.modules():
            if isinstance(module, AdaptedLinear):
                module.set_scale(0.5 + i)
        with torch._dynamo.config.patch(error_on_recompile=True):
            found = gradients(compiled, count)
        close({k.removeprefix("_orig_mod."): v for k, v in found.items()}, gradients(model, count))


def test_a_changed_batch_size_recompiles_once_where_nothing_is_said_of_it():
    compiled = torch.compile(patched(depth=1), fullgraph=True, backend="aot_eager")
    gradients(compiled, 4), gradients(compiled, 3)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count in BATCHES:
            gradients(compiled, count)


def test_adapters_are_swapped_without_recompiling():
    model, other = patched(depth=1), patched(depth=1)
    for parameter in trained(other).values():
        torch.nn.init.normal_(parameter, std=0.1)
    states = {
        "first": fused_lora.lora_state_dict(model),
        "second": fused_lora.lora_state_dict(other),
    }
    model.head.load_state_dict(other.head.state_dict())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, _ = batch()
    first = compiled(x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        fused_lora.load_lora_state_dict(model, states["second"])
        torch.testing.assert_close(compiled(x), other(x))
        fused_lora.load_lora_state_dict(model, states["first"])
        assert torch.equal(compiled(x), first)


@pytest.mark.parametrize(
    "options",
    [{"dropout": 0.1}, {"dora": True}, {"mid": "full"}, {"mid": "diagonal", "dora": True}],
    ids=lambda options: "+".join(options),
)
def test_every_option_compiles_whole(options):
    model = patched(depth=1, **options)
    if "dropout" in options:
        model.eval()
        gradients(torch.compile(model, fullgraph=True, backend="aot_eager").train())
        model.eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = {k.removeprefix("_orig_mod."): v for k, v in gradients(compiled).items()}
    close(found, gradients(model))


def test_merging_and_disabling_are_seen_by_a_compiled_model():
    model = patched(depth=1).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, _ = batch()
    with torch.no_grad():
        y = compiled(x)
        fused_lora.merge(model)
        torch.testing.assert_close(compiled(x), y)
        fused_lora.unmerge(model)
        assert torch.equal(compiled(x), y)
        with fused_lora.disable(model):
            torch.testing.assert_close(compiled(x), model(x))
            assert not torch.allclose(compiled(x), y)


def test_checkpointing_inside_a_compiled_model():
    model = patched(depth=1)
    model.set_grad_checkpointing(True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = {k.removeprefix("_orig_mod."): v for k, v in gradients(compiled).items()}
    close(found, gradients(patched(depth=1)))


@pytest.mark.parametrize("strict", [False, True])
def test_export_keeps_one_node_per_linear(strict):
    model = patched(depth=1).eval()
    x, _ = batch()
    sizes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model, (x,), dynamic_shapes=sizes, strict=strict)
    target = torch.ops.fused_lora.lora_linear_exported.default
    nodes = [n for n in program.graph.nodes if n.target is target]
    assert len(nodes) == sum(isinstance(m, AdaptedLinear) for m in model.modules())
    torch.testing.assert_close(program.module()(x[:3]), model(x[:3]))
