"""patch(level="block"): what is fused, what is said, what is kept, and the way back."""

from __future__ import annotations

import copy

import pytest
import torch

import fused_lora
from fused_lora.bench.methods import Frozen
from fused_lora.bench.saved_tensors import SavedBytes, saved_tensors, text
from fused_lora.nn import FusedLoRABlock, FusedLoRAMlp
from fused_lora.nn.block_modules import FusedModule
from fused_lora.ops.operand import RECOMPUTE
from fused_lora.patching.blocks import need_of, rows_of
from tests.patching.models import VARIANTS, build, images, wake

BASE = {"embed_dim": 768, "num_heads": 12, "depth": 3, "img_size": 64}  # ViT-B's blocks, 65 tokens
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "amp": torch.float32}


def fused_modules(model):
    return {
        name: module for name, module in model.named_modules() if isinstance(module, FusedModule)
    }


class TestReport:
    def test_known_blocks(self):
        model = build()
        report = fused_lora.patch(model, rank=4, level="block", batch_size=8)
        assert [(row.name, row.level, row.recompute) for row in report.blocks] == [
            ("blocks.0", "block", "elementwise"),
            ("blocks.1", "block", "elementwise"),
        ]
        assert "blocks.0 and 1 more: fused, recompute elementwise, keeps" in str(report)
        assert isinstance(model.blocks[1], FusedLoRABlock)
        assert isinstance(model.blocks[1].mlp, FusedLoRAMlp)

    def test_unknown_blocks_are_left_with_the_reason(self):
        model = VARIANTS["post-norm"]()
        text = str(fused_lora.patch(model, rank=4, level="block"))
        assert (
            "blocks.0 and 1 more: left to its modules: ResPostBlock is no block whose forward is "
            "known" in text
        )
        assert "blocks.0.mlp and 1 more: fused, recompute elementwise" in text

    def test_hooks_are_a_reason(self):
        model = build()
        model.blocks[0].mlp.act.register_forward_hook(lambda *_: None)
        model.blocks[0].norm1.register_forward_hook(lambda *_: None)
        report = fused_lora.patch(model, rank=4, level="block")
        assert report.blocks[0].reason == ("attention: hooks on a LayerNorm; MLP: hooks on a GELU")
        assert [row.level for row in report.blocks] == ["linear", "block"]

    def test_one_half(self):
        model = build()
        model.blocks[0].mlp.act.register_forward_hook(lambda *_: None)
        text = str(fused_lora.patch(model, rank=4, level="block"))
        assert "MB; one half left to its modules, MLP: hooks on a GELU" in text

    def test_only_some_projections(self):
        model = build()
        report = fused_lora.patch(model, rank=4, level="block", targets=["q", "v"])
        assert "Linear without adapters" in report.blocks[0].reason
        assert not fused_modules(model)

    def test_the_level_of_linears_says_nothing(self):
        model = build()
        assert not fused_lora.patch(model, rank=4, level="linear").blocks
        assert not fused_modules(model)


def test_explain_says_what_blocks_keep():
    model = build()
    report = fused_lora.patch(model, rank=4, level="block", batch_size=8)
    text = fused_lora.explain(model, batch_size=8).split("\n\n")[-1]
    assert text.startswith("blocks.0 and 1 more\n  block of 136 rows, recompute elementwise")
    assert f"elementwise {report.blocks[0].kept_bytes / 1e6:,.1f} MB" in text
    fused_lora.unpatch(model)
    fused_lora.patch(model, rank=4, level="linear")
    assert "recompute" not in fused_lora.explain(model, batch_size=8)


def test_recompute_by_layer():
    model = build(depth=3)
    fused_lora.patch(
        model, rank=4, level="block", recompute={r"blocks\.0": "gemm", r"blocks\.[01]": "none"}
    )
    assert [block.recompute for block in model.blocks] == ["gemm", "none", "elementwise"]
    assert [block.mlp.recompute for block in model.blocks] == ["gemm", "none", "elementwise"]


@pytest.mark.parametrize("name", VARIANTS)
def test_unpatch_gives_every_class_back(name):
    model = VARIANTS[name]()
    kinds = {n: (type(m), m.__dict__.keys()) for n, m in model.named_modules()}
    fused_lora.patch(model, rank=4, level="block", recompute="gemm")
    assert fused_modules(model)
    fused_lora.unpatch(model)
    assert {n: (type(m), m.__dict__.keys()) for n, m in model.named_modules()} == kinds


class TestRefusals:
    @pytest.mark.parametrize(
        "options, words",
        [
            ({"level": "model"}, "level must be one of .*, got 'model'"),
            ({"recompute": "all"}, "recompute must be one of .*, got 'all'"),
            ({"recompute": {"blocks": "all"}}, "recompute must be one of .*, got 'all'"),
            ({"recompute": {"(": "none"}}, r"recompute: '\(' is no regular expression"),
            ({"recompute": {"block_9": "none"}}, "recompute: 'block_9' matches no module's name"),
            ({"level": "linear", "recompute": "none"}, "are for blocks: use level='block'"),
            ({"level": "linear", "memory_budget_gb": 1}, "are for blocks: use level='block'"),
            ({"recompute": "none", "memory_budget_gb": 1}, "give recompute or memory_budget_gb"),
            ({"memory_budget_gb": 0}, "must be a positive number, got 0"),
            ({"memory_budget_gb": 1e-4}, r"memory_budget_gb=0.0001 is not enough: .* GB"),
        ],
    )
    def test_leave_the_model_as_it_was(self, options, words):
        model = build()
        kinds = [type(module) for module in model.modules()]
        with pytest.raises(fused_lora.PatchError, match=words):
            fused_lora.patch(model, rank=4, **({"level": "block"} | options))
        assert [type(module) for module in model.modules()] == kinds
        assert all(p.requires_grad for p in model.parameters())

    def test_a_budget_needs_every_block(self):
        model = VARIANTS["post-norm"]()
        with pytest.raises(fused_lora.PatchError, match="and one is not: blocks.0: ResPostBlock"):
            fused_lora.patch(model, rank=4, level="block", memory_budget_gb=1)
        assert not fused_modules(model)


def kept(model, x, dtype="fp32"):
    """(bytes the second block keeps, bytes in all)."""
    with (
        SavedBytes(model, [x], list(model.blocks)) as saved,
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == "amp"),
    ):
        y = model(x)
    del y
    return saved.by_section["1"], saved.total


class TestKept:
    """DESIGN.md section 4: what the frozen block keeps and h, or less than half of it."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("rank", [16, 256])
    def test_beside_the_frozen_block(self, dtype, rank):
        base = build(**BASE).to(DTYPES[dtype]).train().requires_grad_(False)
        x = images(base, 2)
        floor, floor_in_all = kept(Frozen().install(copy.deepcopy(base), 0), x, dtype)
        item = 4 if dtype == "fp32" else 2
        h = 2 * 65 * 6 * rank * item  # of six projections
        for mode, limit, low in (("elementwise", 1.03, h), ("gemm", 0.45, 0)):
            model = copy.deepcopy(base)
            fused_lora.patch(model, rank=rank, level="block", recompute=mode)
            block, in_all = kept(model, x, dtype)
            assert block <= limit * floor + low
            assert in_all <= limit * floor_in_all + 3 * low

    @pytest.mark.parametrize("name", ["plain", "LayerScale", "qk-norm", "packed SwiGLU", "SwiGLU"])
    @pytest.mark.parametrize("mode", RECOMPUTE)
    def test_the_count_from_shapes(self, name, mode):
        model = VARIANTS[name]().train()
        report = fused_lora.patch(model, rank=4, level="block", recompute=mode, batch_size=8)
        wake(model)
        x = images(model, 8)
        found, _ = kept(model, x)
        rows = 8 * rows_of("blocks.1", report.rows_per_image)
        assert found == need_of("blocks.1", model.blocks[1], rows).kept[mode]
        assert report.blocks[1].kept_bytes == found


class TestBudget:
    def needs(self, batch_size):
        model = build(depth=4)
        fused_lora.patch(model, rank=4, level="block", batch_size=batch_size)
        held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
        fixed = held + 3 * sum(p.nbytes for p in model.parameters() if p.requires_grad)
        return need_of("", model.blocks[1], 17 * batch_size).kept, fixed

    @pytest.mark.parametrize("counts", [(4, 0, 0), (1, 3, 0), (0, 4, 0), (0, 1, 3), (0, 0, 4)])
    def test_as_little_as_it_takes_is_made_again(self, counts):
        kept, fixed = self.needs(16)
        budget = fixed + sum(kept[mode] * n for mode, n in zip(RECOMPUTE, counts, strict=True))
        model = build(depth=4)
        report = fused_lora.patch(
            model, rank=4, level="block", batch_size=16, memory_budget_gb=(budget + 100) / 1e9
        )
        modes = [block.recompute for block in model.blocks]
        assert tuple(modes.count(mode) for mode in RECOMPUTE) == counts
        assert [row.recompute for row in report.blocks] == modes


def test_the_ledger_adds_up():
    model = build().train()
    fused_lora.patch(model, rank=4, level="block")
    wake(model)
    x = torch.randn(2, 17, 48, requires_grad=True)
    with SavedBytes(model, [x]) as saved:
        y = model.blocks[0](x)
    entries = saved_tensors(y, [x], model)
    assert sum(entry.nbytes for entry in entries) == saved.total
    ours = {
        entry.tensor.split()[0] for entry in entries if "LoRAProgram" in entry.op and entry.nbytes
    }
    assert {"linear", "_scaled_dot_product_flash_attention_for_cpu"} <= ours
    assert "the caller" in {entry.held_by for entry in entries}
    table = text(entries, tokens=34)
    assert f"{saved.total / 34:,.1f}" in table.splitlines()[-1]
    assert "held by the model" in text(entries, 34, everything=True)
