"""What is measured of a SLAD student: its head's accuracy, its likeness to the teacher."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from fused_lora.distill.blocks import blocks_of
from fused_lora.distill.cka import layer_cka
from fused_lora.distill.data.batches import Batch
from fused_lora.distill.share import MAPPINGS
from fused_lora.distill.tokens import tokens_of

LEAST = 4  # images of a batch that CKA can use


def accuracy(model: nn.Module, head: nn.Module, batches: Iterator[Batch]) -> float:
    """The share of the images in ``batches`` that ``model`` and ``head`` get right."""
    right = count = 0
    with torch.no_grad():
        for batch in batches:
            logits = head(tokens_of(model, batch.images, head.blocks))  # type: ignore
            right += int((logits.argmax(1) == batch.labels).sum())
            count += len(batch.labels)
    return right / count


def mapped_cka(
    teacher: nn.Module, student: nn.Module, mapping: str, batches: Iterator[Batch]
) -> dict[str, dict[str, float]]:
    """CKA of each of the student's blocks with the one of the teacher that it is mapped to."""
    theirs, mine = ([block.name for block in blocks_of(model)] for model in (teacher, student))
    images = (batch.images for batch in batches if len(batch.labels) >= LEAST)
    table = layer_cka(teacher, student, images)  # [L_t, L_s]
    chosen = [MAPPINGS[mapping](i, len(mine), len(theirs)) for i in range(len(mine))]
    return {mine[i]: {theirs[g]: float(table[g, i])} for i, g in enumerate(chosen)}
