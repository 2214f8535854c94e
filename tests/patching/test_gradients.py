"""Gradients of patched blocks at their true widths and 197 tokens, every parameter."""

import pytest
import torch

from tests.patching.gradients import SHAPES, verdicts


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2))])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_gradient_is_within_the_yardstick(shape, dtype, seed):
    found = list(verdicts(shape, dtype, seed, rank=16))
    assert len(found) == 3 * 2 * 2 * 6  # modes, halves, blocks, projections
    wrong = [str(verdict) for verdict in found if not verdict.passed]
    assert not wrong
