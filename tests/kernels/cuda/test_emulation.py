"""The emulated block sees what a GPU may punish: reads too early, and work out of bounds."""

from __future__ import annotations

import ctypes
from itertools import product
from types import ModuleType

import pytest

WORLDS = list(product((False, True), repeat=2))  # threads backwards, copies late


@pytest.fixture
def library(host: ModuleType) -> ctypes.CDLL:
    """The parts of the module that only tests see."""
    return ctypes.CDLL(host.__file__)


def test_a_kernel_that_waits_is_right_in_every_world(library: ctypes.CDLL) -> None:
    assert [library.host_misses(True, True, *world) for world in WORLDS] == [0] * 4
    assert [library.host_remote_misses(True, True, back) for back in (False, True)] == [0, 0]


def test_a_missing_wait_is_seen(library: ctypes.CDLL) -> None:
    assert any(library.host_misses(False, True, *world) for world in WORLDS)


def test_bulk_copies_are_there_when_a_barrier_says_so(library: ctypes.CDLL) -> None:
    assert [library.host_bulk_misses(True, True, *world) for world in WORLDS] == [0] * 4
    assert [library.host_bulk_misses(True, False, *world) for world in WORLDS] == [-1] * 4
    assert all(library.host_bulk_misses(False, True, *world) for world in WORLDS)


def test_a_missing_barrier_is_seen(library: ctypes.CDLL) -> None:
    assert any(library.host_misses(True, False, *world) for world in WORLDS)
    assert library.host_remote_misses(False, True, False) > 0
    assert library.host_remote_misses(True, False, False) == -1


@pytest.mark.parametrize(
    "kind",
    range(10),
    ids=["write beyond", "warp parts", "block parts", "load beyond", "copy not aligned",
         "no barrier", "no fence", "half of 16 bytes", "bulk copies that nobody waits for",
         "a product of fp32 as it is"],
)  # fmt: skip
def test_what_is_refused(library: ctypes.CDLL, kind: int) -> None:
    assert library.host_refuses(kind)
