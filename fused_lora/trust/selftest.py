"""The self-test: every kernel of a device checked now, as a table, rows and an exit status."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fused_lora.kernels.cuda import lora_linear as hopper
from fused_lora.kernels.cuda import native
from fused_lora.kernels.triton import available, spills
from fused_lora.trust.check import NotNow, products_as
from fused_lora.trust.everything import everything
from fused_lora.trust.subjects import DTYPES, Checked
from fused_lora.trust.verdict import Subject, Verdict
from fused_lora.trust.verify import renew

WORDS = {True: "passed", False: "FAILED", None: "not run"}


@dataclass(frozen=True)
class Result:
    """One subject after its check."""

    subject: Subject
    verdict: Verdict | None  # None: not run
    said: str  # the comparison, or why it was not run
    seconds: float

    @property
    def word(self) -> str:
        """passed, FAILED or not run."""
        return WORDS[None if self.verdict is None else self.verdict.passed]

    def row(self) -> dict[str, Any]:
        """As a line of JSON."""
        figures = {} if self.verdict is None else self.verdict.row()
        said = {"verdict": self.word, "said": self.said, "seconds": round(self.seconds, 2)}
        return asdict(self.subject) | figures | said

    def __str__(self) -> str:
        s = self.subject
        name = f"{s.backend} {s.kernel}"
        return f"  {self.word:8} {name:18} {s.configuration:34} {s.dtype:9} {self.said}"


def selftest(
    device: torch.device | str | None = None,
    dtypes: Sequence[str] = tuple(DTYPES),
    tell: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Check every kernel on ``device``, whatever was found before; verdicts are kept.

    Args:
        device: A CUDA device; None for the current one. Without one nothing runs, and each result
            says why.
        dtypes: Of float32, tf32, bfloat16 and float16.
        tell: Called with each result as it comes.

    Raises:
        ValueError: a dtype of another name, or a device that is not here.
    """
    if odd := [name for name in dtypes if name not in DTYPES]:
        raise ValueError(f"dtypes must be of {tuple(DTYPES)}, got {odd}")
    target = _target(device)
    results = []
    for checked in everything(dtypes, target):
        results.append(_result(checked, target))
        tell(results[-1])
    return results


def passed_over(device: torch.device | str | None = None) -> list[str]:
    """A line for each tile that another stands in for on ``device``, since its kernel spills."""
    known = spills.passed_over(_target(device))
    return [f"  passed over: {name}: {reason}" for name, reason in known.items()]


def _target(device: torch.device | str | None) -> torch.device:
    here = torch.cuda.is_available()
    target = torch.device(device or ("cuda" if here else "cpu"))
    if target.type == "cuda" and not here:
        raise ValueError(f"device {str(target)!r}: torch sees no CUDA device")
    if target.type == "cuda" and target.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return target


def _result(checked: Checked, device: torch.device) -> Result:
    began = time.perf_counter()
    try:
        if reason := _why_not(checked, device):
            raise NotNow(reason)
        with products_as(checked.subject.dtype):
            verdict = renew(checked, device)
    except NotNow as reason:
        return Result(checked.subject, None, str(reason), 0.0)
    return Result(checked.subject, verdict, str(verdict), time.perf_counter() - began)


def _why_not(checked: Checked, device: torch.device) -> str | None:
    if checked.subject.backend == "triton":
        return available.why_not(device, DTYPES[checked.subject.dtype])
    if checked.subject.kernel.startswith("lora_linear"):
        return hopper.why_not(device)
    return native.why_not_on(device)


def summary(results: Sequence[Result], device: str) -> str:
    """One sentence on all of them."""
    counts = {word: sum(r.word == word for r in results) for word in WORDS.values()}
    if counts["not run"] == len(results):
        reasons = "; ".join(dict.fromkeys(r.said for r in results))
        return f"nothing can run here: {reasons}"
    took = sum(r.seconds for r in results)
    said = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    return f"{device}: {said} in {took:.0f} s"
