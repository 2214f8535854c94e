"""The mask: its rate, its independence of width within a row, its seeds; the right mean."""

import pytest
import torch

from fused_lora.reference import dropout as reference


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_rate_and_mean(p):
    keep = reference.keep(400, 250, p, seed=3, step=4)
    deviation = (p * (1 - p) / keep.numel()) ** 0.5
    assert abs(float(keep.double().mean()) - (1 - p)) <= 5 * deviation
    x = torch.ones(400, 250, dtype=torch.float64)
    assert abs(float(reference.dropout(x, p, 3, 4).mean()) - 1) <= 5 * deviation / (1 - p)


def test_a_row_begins_a_block_whatever_its_width():
    wide = reference.keep(5, 16, 0.5, 1, 2)
    assert torch.equal(reference.keep(5, 9, 0.5, 1, 2), wide[:, :9])
    assert not torch.equal(reference.keep(5, 16, 0.5, 1, 3), wide)
    assert not torch.equal(reference.keep(5, 16, 0.5, 2, 2), wide)


def test_an_infinity_that_is_dropped_is_zero():
    x = torch.full((4, 64), torch.inf)
    assert not reference.dropout(x, 0.5, 1, 2).isnan().any()


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan"), 1 - 1e-9])
def test_refusals(p):
    with pytest.raises(ValueError, match="dropout must lie in"):
        reference.threshold(p)
