"""Philox against its authors' numbers; stochastic rounding against its definition."""

from __future__ import annotations

import pytest
import torch

from fused_lora.reference.philox import philox4x32, random16, round_with, stochastic_round

# Known answers of the authors' library (Random123, kat_vectors): counter, key, words.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


@pytest.mark.parametrize("counter, key, words", KNOWN)
def test_known_answers(counter: str, key: str, words: str) -> None:
    start = tuple(torch.tensor([int(word, 16)]) for word in counter.split())
    low, high = (int(word, 16) for word in key.split())
    got = [f"{int(word):08x}" for word in philox4x32(start, (low, high))]
    assert got == words.split()


def test_bits_are_the_documented_halves() -> None:
    block = philox4x32(tuple(torch.tensor([n]) for n in (3, 0, 11, 0)), (5, 0))
    halves = [half for word in block for half in (int(word) & 0xFFFF, int(word) >> 16)]
    assert random16(torch.arange(24, 32), seed=5, step=11).tolist() == halves


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_unbiased_and_between_neighbours(dtype: torch.dtype) -> None:
    x = torch.full((1 << 16,), 1.0 + 2**-13)  # 1/64 or 1/8 of the way to the next number
    rounded = stochastic_round(x, dtype, seed=1).double()
    spacing = torch.finfo(dtype).eps
    assert set(rounded.tolist()) == {1.0, 1.0 + spacing}
    share = (rounded > 1).double().mean().item() * spacing
    assert share == pytest.approx(2**-13, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_the_type_stays(dtype: torch.dtype) -> None:
    numbers = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    rounded = round_with(numbers.float(), dtype, torch.full((65536,), 65535))
    number = ~numbers.isnan()
    assert torch.equal(rounded[number].view(torch.int16), numbers[number].view(torch.int16))
    assert rounded[~number].isnan().all()


def test_steps_and_seeds_differ_and_repeat() -> None:
    x = torch.rand(1000)
    first = stochastic_round(x, torch.bfloat16, seed=1, step=1)
    assert torch.equal(first, stochastic_round(x, torch.bfloat16, seed=1, step=1))
    assert not torch.equal(first, stochastic_round(x, torch.bfloat16, seed=1, step=2))
    assert not torch.equal(first, stochastic_round(x, torch.bfloat16, seed=2, step=1))


def test_offset_continues_the_flat_order() -> None:
    x = torch.rand(3, 7)
    whole = stochastic_round(x, torch.bfloat16, seed=1, offset=5)
    assert torch.equal(whole[1:], stochastic_round(x[1:], torch.bfloat16, seed=1, offset=12))


def test_refuses_other_types() -> None:
    with pytest.raises(ValueError, match="float32"):
        stochastic_round(torch.ones(1), torch.float32)
