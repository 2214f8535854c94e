"""The cases that ``pytest benchmarks/`` times, small enough for two cores and a minute.

The shapes are those of the package, ``fused_lora.bench.shapes``, which the installed command uses.
"""

from __future__ import annotations

from fused_lora.bench.shapes import SHAPES

BATCH = 8  # images; 1,576 rows of 197 tokens
WIDTHS = [SHAPES["vit_small_patch16_224"], SHAPES["vit_base_patch16_224"]]
RANKS = [16, 128, 512]  # low; below and above the crossing of the two gradient algorithms
STEP_BATCH = 2
STEP_RANKS = [16, 128]
