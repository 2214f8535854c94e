"""What turns tokens into a task's logits: classes of an image, classes of each pixel."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_lora.arguments import whole
from fused_lora.distill.blocks import Tokens


class ClassificationHead(nn.Module):
    """A two-layer MLP on the class tokens of the last blocks, side by side (SLAD).

    Args:
        width: d of the tokens.
        classes: of the logits.
        blocks: how many last blocks it reads.
        hidden: width between its layers; None for ``width``.
    """

    def __init__(self, width: int, classes: int, blocks: int = 3, hidden: int | None = None):
        super().__init__()
        _check_sizes(width=width, classes=classes, blocks=blocks, hidden=hidden or width)
        self.blocks, self.width, self.classes = blocks, width, classes
        between = hidden or width
        layers = nn.Linear(blocks * width, between), nn.GELU(), nn.Linear(between, classes)
        self.mlp = nn.Sequential(*layers)

    def forward(self, tokens: Tokens) -> Tensor:
        """Logits [B, classes]."""
        _check_tokens(tokens, self.blocks, self.width)
        return self.mlp(torch.cat(tokens.classes[-self.blocks :], dim=-1))  # of [B, blocks * d]


class SegmentationHead(nn.Module):
    """BatchNorm and a 1x1 convolution on the last block's patch tokens, scaled up to the image.

    Args:
        width: d of the tokens.
        classes: of the logits.
    """

    blocks = 1

    def __init__(self, width: int, classes: int):
        super().__init__()
        _check_sizes(width=width, classes=classes)
        self.width, self.classes = width, classes
        self.norm = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, classes, 1)

    def forward(self, tokens: Tokens) -> Tensor:
        """Logits [B, classes, height, width] of the image's size."""
        _check_tokens(tokens, self.blocks, self.width)
        patches = tokens.patches[-1]  # [B, rows * columns, d]
        rows, columns = grid_of(patches.shape[1], tokens.size)
        x = patches.transpose(1, 2).unflatten(-1, (rows, columns))  # [B, d, rows, columns]
        logits = self.conv(self.norm(x))
        return F.interpolate(logits, tokens.size, mode="bilinear", align_corners=False)


def grid_of(patches: int, size: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of square patches in an image of ``size``; ValueError if there are none."""
    height, width = size
    rows = round(math.sqrt(patches * height / width))
    columns = patches // rows if rows else 0
    if not patches or rows * columns != patches or rows * width != columns * height:
        raise ValueError(f"{patches} patch tokens are no grid of squares in an image of {size}")
    return rows, columns


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        whole(name, size)


def _check_tokens(tokens: Tokens, blocks: int, width: int) -> None:
    if len(tokens.blocks) < blocks:
        raise ValueError(f"the head reads {blocks} blocks, but was given {len(tokens.blocks)}")
    if tokens.blocks[-1].shape[-1] != width:
        raise ValueError(
            f"the head reads tokens of width {width}, got {tuple(tokens.blocks[-1].shape)}"
        )
