"""Random numbers as a function of where a run is, so that there is no state to save.

``torch.manual_seed`` queues a call with its traceback for a GPU that may never be used: a
millisecond each time, and never freed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def seed(number: int) -> None:
    """Seed the CPU's generator, and the GPU's where there is one in use."""
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(number)


@contextmanager
def seeded(number: int) -> Iterator[None]:
    """Within the block the CPU draws the numbers of ``number``; afterwards it goes on as before."""
    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(number)
    try:
        yield
    finally:
        torch.default_generator.set_state(before)
