"""A check in a process of its own, with a time limit: its hang, abort or fault is a verdict.

One such process serves many checks, one after another, and is left after any that did not end by a
comparison, since its device may be spoilt. A kernel that ends the process, or that does not end, is
wrong. That a process cannot be started, or was killed from outside, says nothing of a kernel.
"""

from __future__ import annotations

import contextlib
import os
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fused_lora import env
from fused_lora.verify.check import CannotVerifyNow, OutOfMemory, Verdict, broken, products_as
from fused_lora.verify.kernel_registry import Checked
from fused_lora.worker import CannotStart, Killed, Leave, Worker, WorkerError

LIMIT_S = 60.0  # of one check, its compiling included
FUNCTION = "perform"

_worker = Worker()


def limit_s() -> float:
    """The value of FUSED_LORA_CHECK_SECONDS.

    Raises:
        ValueError: it is no number of seconds above 0.
    """
    value = env.text("FUSED_LORA_CHECK_SECONDS")
    try:
        found = LIMIT_S if value is None else float(value)
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise ValueError(f"FUSED_LORA_CHECK_SECONDS must be seconds above 0, got {value!r}")
    return found


def serves(checked: Checked, device: torch.device) -> bool:
    """Whether a check goes there: on a GPU, unless FUSED_LORA_CHECK_PROCESS is off."""
    asked = env.flag("FUSED_LORA_CHECK_PROCESS", default=True)
    return bool(checked.recipe) and device.type == "cuda" and asked


def check(checked: Checked, device: torch.device, worker: Worker | None = None) -> Verdict:
    """The verdict that the other process finds, or that its end is.

    Raises:
        CannotVerifyNow: there is no process to ask, or no memory on its device.
    """
    limit = limit_s()
    asked = (checked.recipe, str(device), uuid(device), checked.subject.dtype)
    try:
        answer = (worker or _worker).call(__name__, FUNCTION, asked, limit)
    except (CannotStart, Killed) as error:
        raise OutOfMemory(f"its check {error}") from None
    except WorkerError as error:
        return broken(f"its check {error}")
    if "not now" in answer:
        raise OutOfMemory(answer["not now"])
    found = Verdict.of_row(answer["verdict"])
    return broken("its check gave no verdict") if found is None else found


def perform(recipe: Any, device: str, chip: str, dtype: str) -> Any:
    """In the other process: check what ``recipe`` makes, on the device that is ``chip``."""
    try:
        target, checked = of_uuid(torch.device(device), chip), Checked.of_recipe(recipe)
    except Exception as error:  # such as of a device that takes one process alone
        return Leave({"not now": f"another process cannot use {device}: {error}"})
    with products_as(dtype):
        try:
            found = checked.check(target)
        except CannotVerifyNow as reason:
            return Leave({"not now": str(reason)})  # with what it holds
    answer = {"verdict": found.row()}
    return answer if found.compared else Leave(answer)


def uuid(device: torch.device) -> str:
    """What the driver calls ``device``: another process may number devices in another way."""
    if device.type != "cuda":
        return ""
    return str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))


def of_uuid(device: torch.device, chip: str) -> torch.device:
    """The device of that name, else ``device``; ready for use."""
    if device.type == "cuda":
        torch.cuda.init()
        torch.empty(1, device=device)  # a context, and memory
    for index in range(torch.cuda.device_count() if chip else 0):
        if uuid(torch.device("cuda", index)) == chip:
            return torch.device("cuda", index)
    return device


def close() -> None:
    """End the other process, if there is one."""
    _worker.close()


@contextlib.contextmanager
def alone(key: str, folder: Path, wait_s: float) -> Iterator[bool]:
    """Inside, no other process of this machine checks ``key``; False if it took too long to wait.

    A byte of one file is locked for each key; the system lets go of it where a process ends. Where
    files cannot be locked, everybody is alone.
    """
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / "checks.lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:
        yield True
        return
    try:
        yield _locked(fcntl, handle, zlib.crc32(key.encode()), wait_s)
    finally:
        os.close(handle)


def _locked(fcntl: Any, handle: int, at: int, wait_s: float) -> bool:
    until = time.monotonic() + wait_s
    while True:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, at)
            return True
        except (BlockingIOError, PermissionError):  # held by another
            if time.monotonic() >= until:
                return False
            time.sleep(0.05)
        except OSError:  # a file system without locks
            return True
