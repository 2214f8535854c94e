"""Time shared out and accounted for, models made shallow for a while, moments lent."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from fused_lora.bench.runner import Phases, Shares
from fused_lora.bench.suites.train_step import Moments
from fused_lora.bench.workload import blocks, shallow
from tests.bench.test_timing import FakeClock


def test_phases_add_up() -> None:
    clock = FakeClock()
    phases = Phases(clock)
    for seconds, name in ((1.0, "build"), (2.0, "time"), (3.0, "build")):
        with phases.of(name):
            clock.seconds += seconds
    assert str(phases) == "build 4.0 s, time 2.0 s"


def test_shares_follow_the_weights_and_what_is_left() -> None:
    clock = FakeClock()
    shares = Shares([1.0, 1.0, 2.0], 8.0, clock)
    assert shares.next_s() == 2.0
    clock.seconds = 5.0
    assert shares.next_s() == 1.0
    clock.seconds = 9.0
    assert shares.next_s() == 0.0


def test_a_shallow_model_is_made_of_the_same_modules_and_comes_back() -> None:
    inner = nn.Module()
    inner.blocks = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    wrapped = nn.Sequential(inner)
    whole = inner.blocks
    with pytest.raises(KeyError), shallow(wrapped, 2) as judged:
        assert blocks(judged) == list(whole)[:2]
        raise KeyError
    assert inner.blocks is whole and len(blocks(wrapped)) == 4
    with shallow(nn.Linear(2, 2), 2) as bare:
        assert blocks(bare) == []


def test_moments_are_lent_and_step_as_adamw_does() -> None:
    moments, plain = Moments(), nn.Linear(3, 3)
    lent = nn.Linear(3, 3)
    lent.load_state_dict(plain.state_dict())
    ours = moments.adamw(lent.parameters(), lr=1e-2)
    for model, optimizer in ((plain, torch.optim.AdamW(plain.parameters(), lr=1e-2)), (lent, ours)):
        for _ in range(2):
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(lent.weight, plain.weight)
    other = nn.Linear(3, 3)
    theirs = moments.adamw(other.parameters(), lr=1e-2)
    assert theirs.state[other.weight]["exp_avg"] is ours.state[lent.weight]["exp_avg"]
    assert len(moments._pool) == 4
    del ours, theirs, optimizer
    gc.collect()
    assert not moments._pool
