"""Triton serves a CPU here, unchecked: what it would refuse outside an interpreter is let pass."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fused_lora.kernels.triton import available, launches, lora_linear
from fused_lora.kernels.triton.tiles import MergeTile
from fused_lora.ops import backends, planning
from fused_lora.programs import run
from fused_lora.types import Span
from fused_lora.verify import kernel_registry, verdicts
from fused_lora.verify.check import Shape
from tests.kernels.triton.cases import GRAD_TILE, THIN_TILE, TILE


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch, tmp_path) -> Iterator[pytest.MonkeyPatch]:
    """Fresh plans, no verdicts, a cache folder of the test's own."""
    monkeypatch.setattr(available, "why_not", lambda device=None, dtype=None: None)
    monkeypatch.setenv("FUSED_LORA_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("FUSED_LORA_VERIFY", "off")
    again()
    yield monkeypatch
    again()


@pytest.fixture
def as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations run call by call, where a test watches the calls."""
    monkeypatch.setenv("FUSED_LORA_PROGRAMS", "0")


@pytest.fixture
def checking(serving: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """First use is checked, on few elements."""
    small = Shape(40, 32, 48, (Span(0, 48, 5),), True, True, 0)
    for name in ("SHAPES", "ALIGNED"):
        serving.setattr(kernel_registry, name, (small,))
    serving.setenv("FUSED_LORA_VERIFY", "first")
    return serving


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that few elements fill, of products and of sums over rows."""
    right = launches.tile_of

    def small(kernel: str, *shape: object) -> object:
        if kernel.startswith(("shrink_norm", "shrink_gelu", "expand_", "gelu_grads")):
            return right(kernel, *shape)
        one = kernel.removesuffix("_dropout")
        one = "shrink" if kernel.startswith("expand_") else one
        return {"shrink": THIN_TILE, "grad": GRAD_TILE, "merge": MergeTile(32, 32)}.get(one, TILE)

    for module in (launches, lora_linear):
        monkeypatch.setattr(module, "tile_of", small)


def again() -> None:
    """As a new process would begin."""
    run.forget()
    planning._plan_for.cache_clear()
    backends._triton.cache_clear()
    backends._checked.cache_clear()
    verdicts.forget()
