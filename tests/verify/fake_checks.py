"""Checks that do what no check should; made anew, by name, in the process that runs them."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from fused_lora.verify.check import KernelId, OutOfMemory, Verdict, broken
from fused_lora.verify.kernel_registry import Checked

RIGHT = Verdict(True, 0.25, 1.0, "y")


@dataclass(frozen=True)
class FakeCheck(Checked):
    """``how`` is a function below."""

    how: str = ""
    argument: str = ""

    def check(self, device: torch.device) -> Verdict:
        return globals()[self.how](self.argument)


def make(how: str, argument: str = "", dtype: str = "float32") -> FakeCheck:
    subject = KernelId("triton", "fake", f"{how} {argument}".strip(), dtype)
    recipe = (__name__, "make", how, argument, dtype)
    return FakeCheck(subject, lambda p: {}, recipe=recipe, how=how, argument=argument)


def passes(_: str) -> Verdict:
    print("a kernel's own words")  # which are no answer
    return RIGHT


def fails(_: str) -> Verdict:
    return Verdict(False, 2.0, 1.0, "y")


def hangs(_: str) -> Verdict:
    time.sleep(3600)
    return RIGHT


def holds_the_interpreter(_: str) -> Verdict:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    while True:
        pass


def aborts(_: str) -> Verdict:
    os.write(2, b"device-side assert triggered\n")
    os.abort()


def exits(status: str) -> Verdict:
    os._exit(int(status))


def faults(_: str) -> Verdict:
    import ctypes

    ctypes.string_at(0)
    return RIGHT


def poisons(_: str) -> Verdict:
    """As ``check`` says of an illegal access, which spoils the device for what comes after it."""
    return broken("AcceleratorError: CUDA error: an illegal memory access was encountered")


def is_killed_while_answering(_: str) -> Verdict:
    os.write(int(sys.argv[2]), b'{"result": {"verdict": {"passed": tr')
    os.kill(os.getpid(), signal.SIGKILL)
    return RIGHT


def has_no_memory(_: str) -> Verdict:
    raise OutOfMemory("no memory is left to check a kernel in: CUDA out of memory")


def counts(path: str) -> Verdict:
    """Slow, and each run a line of ``path``."""
    with Path(path).open("a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(0.5)
    return RIGHT


def tells_its_process(path: str) -> Verdict:
    Path(path).write_text(str(os.getpid()))
    return RIGHT
