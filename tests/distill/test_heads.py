"""Tokens of the blocks, and the heads that read them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fused_lora.distill import blocks
from fused_lora.distill.blocks import Tokens, tokens_of
from fused_lora.distill.heads import ClassificationHead, SegmentationHead, grid_of
from fused_lora.patching.report import PatchError
from tests.patching.models import build, images


class TestTokens:
    @pytest.mark.parametrize("norm", [False, True])
    def test_they_are_the_blocks_outputs(self, norm):
        model = build(reg_tokens=4)
        x = images(model)
        h, found = model.norm_pre(model._pos_embed(model.patch_embed(x))), []
        for block in model.blocks:
            h = block(h)
            found.append(model.norm(h) if norm else h)
        got = tokens_of(model, x, norm=norm)
        assert (got.prefix, got.size) == (5, (32, 32))
        assert all(map(torch.equal, got.blocks, found))
        assert torch.equal(got.classes[1], found[1][:, 0])
        assert torch.equal(got.patches[0], found[0][:, 5:])

    def test_the_last_of_them(self):
        model = build(depth=3)
        x = images(model)
        assert all(map(torch.equal, tokens_of(model, x, 2).blocks, tokens_of(model, x).blocks[1:]))
        assert not any(block._forward_hooks for block in model.blocks)

    def test_blocks_are_looked_for_once(self, monkeypatch):
        model, found = build(depth=3), blocks.blocks_of
        x, searched = images(model), []
        monkeypatch.setattr(blocks, "blocks_of", lambda m: searched.append(m) or found(m))
        assert [len(tokens_of(model, x).blocks) for _ in range(3)] == [3, 3, 3]
        del model.blocks[1]
        assert len(tokens_of(model, x).blocks) == 2
        assert len(searched) == 2

    @pytest.mark.parametrize("last", [0, 3, -1, 1.0, True])
    def test_wrong_counts(self, last):
        model = build()
        with pytest.raises(ValueError, match=f"from 1 to 2, got {last}"):
            tokens_of(model, images(model), last)

    def test_a_model_without_blocks(self):
        with pytest.raises(PatchError, match="Linear has no transformer block"):
            tokens_of(nn.Linear(3, 3), torch.zeros(1, 3))

    def test_a_failing_forward_leaves_no_hooks(self):
        model = build()
        with pytest.raises(AssertionError, match="Input height"):
            tokens_of(model, torch.zeros(1, 3, 31, 31))
        assert not any(block._forward_hooks for block in model.blocks)


def made(blocks=3, patches=12, width=8, size=(24, 32), prefix=2):
    shape = (5, prefix + patches, width)
    return Tokens([torch.randn(shape, dtype=torch.float64) for _ in range(blocks)], prefix, size)


class TestClassification:
    @pytest.mark.parametrize("blocks", [1, 3])
    def test_class_tokens_side_by_side(self, blocks):
        head, tokens = ClassificationHead(8, 7, blocks, hidden=11).double(), made()
        x = torch.cat([block[:, 0] for block in tokens.blocks[-blocks:]], 1)
        first, _, second = head.mlp
        y = F.gelu(x @ first.weight.T + first.bias) @ second.weight.T + second.bias
        assert first.weight.shape == (11, blocks * 8)
        torch.testing.assert_close(head(tokens), y)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ((0, 7), "width must be a whole number from 1 on, got 0"),
            ((8, 0), "classes must be .* got 0"),
            ((8, 7, 0), "blocks must be .* got 0"),
            ((8, 7, 3, -1), "hidden must be .* got -1"),
            ((8.0, 7), "width must be .* got 8.0"),
        ],
    )
    def test_bad_sizes(self, options, message):
        with pytest.raises(ValueError, match=message):
            ClassificationHead(*options)

    def test_tokens_that_do_not_fit(self):
        with pytest.raises(ValueError, match="reads 3 blocks, but was given 2"):
            ClassificationHead(8, 7)(made(2))
        with pytest.raises(ValueError, match=r"tokens of width 9, got \(5, 14, 8\)"):
            ClassificationHead(9, 7)(made())


class TestSegmentation:
    def test_each_patch_where_it_lies(self):
        head, tokens = SegmentationHead(8, 7).double().eval(), made()
        logits = head(tokens)
        assert logits.shape == (5, 7, 24, 32)
        weight = head.conv.weight.flatten(1)
        norm = head.norm
        each = (tokens.blocks[-1][:, 2:] / (1 + norm.eps) ** 0.5) @ weight.T + head.conv.bias
        small = each.view(5, 3, 4, 7).permute(0, 3, 1, 2)  # 3 x 4 patches of 8 pixels
        torch.testing.assert_close(
            logits, F.interpolate(small, (24, 32), mode="bilinear", align_corners=False)
        )

    def test_batch_norm_is_over_all_patches(self):
        head, tokens = SegmentationHead(8, 7).double(), made()
        head(tokens)
        mean = tokens.blocks[-1][:, 2:].mean((0, 1))
        torch.testing.assert_close(head.norm.running_mean, 0.1 * mean)

    @pytest.mark.parametrize(
        ("patches", "size", "grid"),
        [(12, (24, 32), (3, 4)), (16, (32, 32), (4, 4)), (2, (16, 8), (2, 1)), (1, (8, 8), (1, 1))],
    )
    def test_grids(self, patches, size, grid):
        assert grid_of(patches, size) == grid

    @pytest.mark.parametrize(("patches", "size"), [(13, (24, 32)), (12, (32, 32)), (0, (8, 8))])
    def test_no_grid(self, patches, size):
        with pytest.raises(ValueError, match=f"{patches} patch tokens are no grid of squares"):
            grid_of(patches, size)
