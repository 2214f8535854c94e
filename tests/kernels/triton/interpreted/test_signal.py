"""One rounding keeps the adapter's signal, two lose half of it (DESIGN.md section 3)."""

import pytest

from fused_lora.kernels.triton import lora_extended, lora_one_pass
from fused_lora.kernels.triton.tiles import Tile
from tests.kernels.triton.gain import gain, separate

SIZES = (128, 256, 256)
TILE = Tile(64, 64, 64, 2, 4)


@pytest.mark.parametrize("kernel", [lora_extended, lora_one_pass], ids=["EXTENDED", "ONE_PASS"])
def test_one_rounding_keeps_it(kernel):
    kept = gain(lambda x, w, group: kernel.forward(x, w, None, group, tile=TILE).y, *SIZES)
    assert 0.99 <= kept <= 1.01


def test_two_roundings_lose_half_of_it():
    kept = gain(separate, *SIZES)
    assert 0.45 <= kept <= 0.65
