"""A CPU that the compiled room believes to be served, by its kernels' own source."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch

from fused_lora.kernels.cuda import lora_extended, native
from fused_lora.kernels.cuda.lora_grad_shape import Form, GradShape, examples
from fused_lora.kernels.cuda.native import Chip
from fused_lora.ops import backends, lora_grad_backends, planning
from fused_lora.programs import run
from fused_lora.verify import kernel_registry, launch_checks, verdicts


class Served:
    """What the fixture hands out: how often the kernels ran, and what is done to their results."""

    def __init__(self) -> None:
        self.runs = 0
        self.checks = 0
        self.fault = lambda grad: grad
        self.normed = 0  # runs that formed x as a LayerNorm
        self.of = ""  # activation or norm: the fault is that of an x formed so alone

    def watch(self, monkeypatch: pytest.MonkeyPatch, module: ModuleType, counts: str) -> None:
        right = module.lora_grads

        def lora_grads(*args, **options):
            setattr(self, counts, getattr(self, counts) + 1)
            self.normed += counts == "runs" and options.get("norm") is not None
            found = right(*args, **options)
            if self.of and options.get(self.of) in (None, "none"):
                return found
            return found._replace(b=[None if b is None else self.fault(b) for b in found.b])

        monkeypatch.setattr(module, "lora_grads", lora_grads)


def forget() -> None:
    """As a new process would begin."""
    run.forget()
    planning._plan_for.cache_clear()
    backends._triton.cache_clear()
    lora_grad_backends.checked.cache_clear()
    lora_extended.forget()
    verdicts.forget()


@pytest.fixture
def served(host: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path) -> Iterator[Served]:
    """Small checks, fresh verdicts, and costs at which the compiled gradients win."""
    made = Served()
    monkeypatch.setenv("FUSED_LORA_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("FUSED_LORA_VERIFY", raising=False)
    monkeypatch.setattr(native, "load", lambda: host)
    monkeypatch.setattr(native, "why_not", lambda device=None: None)
    monkeypatch.setattr(Chip, "of", staticmethod(lambda device: Chip(90, 1)))
    monkeypatch.setattr(lora_grad_backends, "why_not_on", lambda device: None)
    monkeypatch.setattr(kernel_registry, "why_not_on", lambda device: None)
    monkeypatch.setattr(launch_checks, "ROWS", 21)
    monkeypatch.setattr(lora_grad_backends, "examples", narrow)
    for name, value in {"CUDA_EFFICIENCY": 1e6, "CUDA_LAUNCH_CALLS": 0.0, "SLICES": 0}.items():
        monkeypatch.setattr(f"fused_lora.plan.cost_kernels.{name}", value)
    made.watch(monkeypatch, lora_grad_backends, "runs")
    made.watch(monkeypatch, launch_checks, "checks")
    forget()
    yield made
    forget()


def narrow(chip: Chip, tf32: bool) -> dict[Form, GradShape]:
    """Examples that few emulated columns make up."""
    found = {form: shape._replace(k=40, n=40) for form, shape in examples(chip, tf32).items()}
    return {form: shape for form, shape in found.items() if shape.form(chip) == form}


@contextmanager
def tf32() -> Iterator[None]:
    """Inside, torch allows products of fp32 by TF32."""
    setting = torch.backends.cuda.matmul
    before, setting.fp32_precision = setting.fp32_precision, "tf32"
    try:
        yield
    finally:
        setting.fp32_precision = before


def one_element(grad: torch.Tensor) -> torch.Tensor:
    """``grad`` with one element off by its root mean square."""
    wrong = grad.clone()
    wrong[grad.shape[0] // 2, 0] += grad.float().square().mean().sqrt().to(grad.dtype)
    return wrong
