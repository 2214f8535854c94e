"""A program reads as the calls it makes, with what each moves."""

from __future__ import annotations

import pytest
import torch

import fused_lora
from fused_lora.programs import run
from fused_lora.programs.describe import described, launches, measured_us, passes, totals, work
from fused_lora.programs.program import InputSpec, build
from tests.patching.models import build as vit
from tests.programs.test_record import Op


def test_bytes_and_flops_of_calls():
    def ahead(x, w):
        y = x.view(6, 4) @ w.t()
        return torch.nn.functional.gelu(y), ((), None)

    tensors = torch.randn(2, 3, 4), torch.randn(5, 4)
    program = build(Op(ahead), [InputSpec.of(t, False) for t in tensors])
    found = {call.target.__name__: work(call) for call in program.calls}
    assert found["view.default"] == (0, 0)
    assert found["linear"] == (2 * 6 * 4 * 5, 4 * (6 * 4 + 5 * 4 + 6 * 5))
    assert found["gelu.default"] == (0, 4 * 2 * 6 * 5)
    assert totals(program)[0].flops == 2 * 6 * 4 * 5
    text = described(program, lambda flops, nbytes: nbytes / 1e3)
    assert "2 calls" in text and "float32[6, 4]" in text and "backward" not in text


def test_what_is_added_to_is_read_and_written_and_passes_are_over_x():
    def ahead(x, w):
        y = x.new_zeros(6, 5)
        y.addmm_(x, w.t())  # reads y
        z = torch.empty_like(y)
        z.copy_(y)
        z.addmm_(x, w.t(), beta=0)  # does not
        return z.mul_(2), ((), None)

    tensors = torch.randn(6, 4), torch.randn(5, 4)
    program = build(Op(ahead), [InputSpec.of(t, False) for t in tensors])
    moved = [work(call).nbytes // 4 for call in program.calls if not call.view]
    x, w, y = 24, 20, 30
    assert [n for n in moved if n] == [y, x + w + 2 * y, 2 * y, x + w + y, 2 * y]
    assert passes(program) == (sum(moved) / x, 0)
    assert launches(program.calls) == 5  # the allocation is none
    assert f"5 launches, 0.000 GFLOP, 0.0 MB, {sum(moved) / x:.1f} passes over x" in described(
        program, lambda flops, nbytes: 0.0
    )


@pytest.fixture
def model():
    model = vit()
    fused_lora.patch(model, rank=4)
    return model.train()


def test_every_call_is_timed(model):
    run.forget()
    model.blocks[0](torch.randn(1, 17, 48))
    for program in run.programs():
        taken = measured_us(program, rounds=2)
        assert taken.keys() == {id(call) for call in (*program.calls, *program.calls_back)}
        assert all(us >= 0 for us in taken.values())


@pytest.mark.parametrize(
    "name, says",
    [
        ("blocks.0.mlp", ["gelu", "blocks.0.mlp.fc1", "lost"]),
        ("blocks.1.attn", ["_scaled_dot_product_flash_attention_for_cpu", "saved"]),
        ("blocks.1", ["gelu", "_scaled_dot_product_flash_attention_for_cpu_backward"]),
        ("blocks.0.attn.proj", ["linear", "backward"]),
    ],
)
def test_explain_of_one_module(model, name, says):
    text = fused_lora.explain_program(model, name, batch_size=2)
    assert all(word in text for word in says), text
    assert "x (2, 17, 48)" in text and "estimated" in text


def test_explain_says_why_there_is_none(model):
    model.blocks[0].mlp.act.register_forward_hook(lambda *_: None)
    text = fused_lora.explain_program(model, "blocks.0.mlp")
    assert "hooks on a GELU" in text
    for name in ("blocks.7", "norm", "patch_embed.proj"):
        with pytest.raises(ValueError, match=name):
            fused_lora.explain_program(model, name)
