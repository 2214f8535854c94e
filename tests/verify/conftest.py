"""A CPU that Triton's room believes to be served, with kernels made of plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from fused_lora.kernels.triton import available
from fused_lora.ops import backends, planning
from fused_lora.verify import launch_checks, verdicts
from fused_lora.verify.check import equations

RESULTS = {
    "shrink": ("h", "dh"),
    "extended": ("y", "dx"),
    "one_pass": ("h", "dh", "y", "dx"),
    "grad": ("da", "db"),
    "merge": ("w'",),
    "merge_many": ("w'",),
    "extended_gelu": ("u", "erf", "erf du", "tanh", "tanh du"),
    "extended_grads": ("erf du", "erf da", "erf db before"),
    "extended_grads_tanh": ("tanh du", "tanh da", "tanh db before"),
    "gelu_grads": ("erf du", "erf da", "erf db before", "erf dh before"),
    "gelu_grads_tanh": ("tanh du", "tanh da", "tanh db before", "tanh dh before"),
    "pack_grads": ("dy", "db", "dh"),
    "extended_scale": ("y", "dx"),
    "extended_wide": ("y", "dx"),
    "one_pass_scale": ("h", "dh", "y", "dx"),
    "one_pass_wide": ("h", "dh", "y", "dx"),
    "extended_dropout": ("dx", "dx of the adapters"),
    "shrink_dropout": ("h",),
    "shrink_norm": ("n", "h"),
    "shrink_gelu": ("erf", "tanh", "h of erf", "h of tanh"),
    "expand_norm": ("dx alone", "dx"),
    "expand_residual": ("y alone", "y"),
    "border_weight": ("right", "below"),
    "grad_dropout": ("da",),
    "layer_norm": ("n", "n again", "dx"),
    "gelu": ("erf", "erf du", "tanh", "tanh du"),
    "quantise": ("x^",),
    "extended_fp8": ("y",),
}


class Kernels:
    """What stands in for Triton's kernels: right unless told otherwise, and counted."""

    def __init__(self) -> None:
        self.runs: dict[str, int] = dict.fromkeys(RESULTS, 0)
        self.faults: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}

    def run(self, name: str, p, tile) -> dict[str, torch.Tensor]:
        self.runs[name] += 1
        right = equations(p.to(p.x.dtype), name)
        fault = self.faults.get(name, lambda t: t)
        return {key: fault(right[key].clone()) for key in RESULTS[name]}


def forget() -> None:
    """As a new process would begin."""
    planning._plan_for.cache_clear()
    backends._triton.cache_clear()
    verdicts.forget()


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch, tmp_path) -> Iterator[Kernels]:
    made = Kernels()
    monkeypatch.setenv("FUSED_LORA_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("FUSED_LORA_VERIFY", raising=False)
    monkeypatch.setattr(available, "why_not", lambda device=None, dtype=None: None)
    monkeypatch.setattr(
        "fused_lora.plan.cost_kernels.TRITON_EFFICIENCY", 1e6
    )  # auto prefers Triton
    monkeypatch.setattr("fused_lora.plan.cost_kernels.TRITON_LAUNCH_CALLS", 0.0)
    for name in RESULTS:
        run = lambda p, tile, name=name: made.run(name, p, tile)  # noqa: E731
        monkeypatch.setitem(launch_checks.RUNS, name, run)
    for name in ("triton_merged", "merged_of_many"):
        monkeypatch.setattr(launch_checks, name, _stochastic)
    forget()
    yield made
    forget()


def _stochastic(p, tile=None, noise=None) -> torch.Tensor:
    from fused_lora.kernels.aten.lora_linear import lora_merge

    return lora_merge(p.w, *p.adapters, noise)
