"""Any order of what people do: the naive model's outputs and gradients, or a refusal by name."""

import pytest

from fused_lora import env
from tests.patching.orders import Walk

SEQUENCES = int(env.text("FUSED_LORA_FUZZ_SEQUENCES") or 500)
PARTS = 10  # tests, so that a failure names its tenth


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(PARTS))
def test_random_orders(part):
    for seed in range(part, SEQUENCES, PARTS):
        walk = Walk(seed)
        try:
            walk.run(steps=3 + seed % 4)
        except Exception as error:
            raise AssertionError(f"sequence {seed}: {walk.done}") from error
