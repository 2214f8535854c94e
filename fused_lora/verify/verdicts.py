"""A kernel serves after its check: asked once, remembered here and on disk."""

from __future__ import annotations

import logging
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from fused_lora import disk, env
from fused_lora.kernels.cuda import native
from fused_lora.kernels.triton import spills
from fused_lora.kernels.triton.available import identity, sources
from fused_lora.programs.record import recording
from fused_lora.verify import own_process
from fused_lora.verify.check import CannotVerifyNow, KernelId, OutOfMemory, Verdict
from fused_lora.verify.kernel_registry import Checked
from fused_lora.worker import Worker

_MODES = torch._C._TorchDispatchModeKey


def why_not_now(device: torch.device) -> str | None:
    """One sentence why nothing can be checked on ``device`` now; None when it can."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured"
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or _recorded():
        return "a program is being traced"
    return None


def why_not_concrete(t: Tensor) -> str | None:
    """One sentence why a kernel cannot read ``t`` by its address; None when it can."""
    if recording():  # its launches are written down
        return None
    if type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"{type(t).__name__} holds no memory that a kernel could read"
    if torch.jit.is_tracing() or _recorded():
        return "a program is being traced, and a launch would leave no trace in it"
    return None


def _recorded() -> bool:
    """Whether operations are recorded, or run without data."""
    if recording():
        return False
    modes = (_MODES.PROXY, _MODES.FAKE, _MODES.FUNCTIONAL)
    return any(torch._C._get_dispatch_mode(mode) is not None for mode in modes)


# Verdicts: asked for once in a process, kept on disk, told to the user where one is bad.
#
# A check runs in a process of its own (``own_process``). Of several processes that ask at once,
# such as the ranks of a training, one checks; the others wait for its verdict, or do without the
# kernel. A memory that is full is not asked again before ``AGAIN_S`` are over.


MODES = ("off", "first", "always")
UNCHECKED = Verdict(True, 0.0, 0.0, "nothing: FUSED_LORA_VERIFY is off")

AGAIN_S = 300.0  # after which what could not be checked is tried again

ABOUT_S = 4.0  # of one check, compiling included: a guess until a GPU has run it

log = logging.getLogger("fused_lora")
_announced = False
_known: dict[tuple[KernelId, torch.device], Verdict] = {}
_held = False
_wanted: dict[tuple[KernelId, torch.device], Checked] | None = None
_later: dict[tuple[KernelId, torch.device], tuple[float, str]] = {}  # until when, and why
_one_at_a_time = threading.Lock()


def verdict(checked: Checked, device: torch.device) -> Verdict:
    """Whether ``checked`` may serve on ``device``; the first to ask may wait for the check.

    Raises:
        CannotVerifyNow: it has no verdict, and none can be found at this moment.
        ValueError: FUSED_LORA_VERIFY is none of its values.
    """
    how = mode()
    if _wanted is not None:
        return _collect(_wanted, checked, device, how)
    if how == "off":
        return UNCHECKED
    if found := _known.get((checked.subject, device)):
        return found
    if how == "first" and (kept := load(checked.subject, device)):
        return _remember(checked.subject, device, kept)
    if reason := why_not_now(device) or _why_later(checked, device):
        raise CannotVerifyNow(reason)
    with _one_at_a_time:
        if found := _known.get((checked.subject, device)):
            return found
        if reason := _why_later(checked, device):
            raise CannotVerifyNow(reason)
        try:
            return _check(checked, device, how)
        except OutOfMemory as error:
            _later[checked.subject, device] = time.monotonic() + AGAIN_S, str(error)
            _tell_later(checked.subject, device, str(error))
            raise


@contextmanager
def collecting(held: bool = True) -> Iterator[dict[tuple[KernelId, torch.device], Checked]]:
    """Inside, what is asked for and has no verdict is collected, and nothing is checked.

    Kernels that have one serve what is recorded; while they are ``held``, what runs is the
    library's.
    """
    global _wanted, _held
    before = _wanted, _held
    _wanted, _held = {}, held
    try:
        yield _wanted
    finally:
        _wanted, _held = before


def is_collecting() -> bool:
    """Whether somebody is ``collecting``."""
    return _wanted is not None


def holds() -> bool:
    """Whether no kernel of this project may run just now, whatever its verdict."""
    return _held and _wanted is not None and not recording()


def _collect(
    wanted: dict[tuple[KernelId, torch.device], Checked],
    checked: Checked,
    device: torch.device,
    how: str,
) -> Verdict:
    where = (checked.subject, device)
    found = UNCHECKED if how == "off" else _known.get(where)
    if found is None and where not in wanted and how == "first" and (kept := load(*where)):
        found = _remember(*where, kept)
    if found is None:
        wanted[where] = checked
    if found is None or holds():
        raise CannotVerifyNow("it is being prepared")
    return found


def known(checked: Checked, device: torch.device) -> Verdict | None:
    """What is known of it in this process or on disk; nothing is checked for it, or told."""
    if mode() == "off":
        return UNCHECKED
    found = _known.get((checked.subject, device))
    return load(checked.subject, device) if found is None and mode() == "first" else found


def accept(checked: Checked, device: torch.device, found: Verdict) -> Verdict:
    """Keep a verdict that was found elsewhere just now."""
    disk.merge(path(), {_key(checked.subject, device): found.row()})
    return _remember(checked.subject, device, found)


def announce(needed: Sequence[Checked], device: torch.device) -> None:
    """Say once, in one line, that kernels of this first step are checked, and for how long."""
    global _announced
    if _announced or _wanted is not None or mode() == "off" or why_not_now(device):
        return
    unknown = [one for one in needed if (one.subject, device) not in _known]
    anew = [one for one in unknown if own_process.serves(one, device)]
    if mode() == "first":
        anew = [one for one in anew if load(one.subject, device) is None]
    if not anew:
        return
    _announced = True
    log.warning(
        "fused_lora: first use on this device: compiling and checking %d kernels for a first plan, "
        "about %d s, and as many for each other kind of layer; kept in %s. fused_lora.prepare does "
        "all of it beforehand.",
        len(anew),
        round(ABOUT_S * len(anew)),
        path().parent,
    )


def _why_later(checked: Checked, device: torch.device) -> str | None:
    """Why a check that could not be made is not tried again yet."""
    until, reason = _later.get((checked.subject, device), (0.0, ""))
    return reason if time.monotonic() < until else None


def renew(checked: Checked, device: torch.device, worker: Worker | None = None) -> Verdict:
    """The verdict found now, whatever is known; kept, and not told. ``worker``: who finds it.

    Raises:
        CannotVerifyNow: nothing can be checked at this moment.
    """
    if reason := why_not_now(device):
        raise CannotVerifyNow(reason)
    found = _found(checked, device, worker)
    disk.merge(path(), {_key(checked.subject, device): found.row()})
    _known[checked.subject, device] = found
    return found


def _found(checked: Checked, device: torch.device, worker: Worker | None) -> Verdict:
    if not own_process.serves(checked, device):
        return checked.check(device)
    found = own_process.check(checked, device, worker)
    spills.refresh(device)  # which the other process may have found
    return found


def mode() -> str:
    """The value of FUSED_LORA_VERIFY."""
    value = env.text("FUSED_LORA_VERIFY") or "first"
    if value not in MODES:
        raise ValueError(f"FUSED_LORA_VERIFY must be one of {MODES}, got {value!r}")
    return value


def path() -> Path:
    """The file of verdicts."""
    return env.cache_dir() / "verdicts.json"


def load(subject: KernelId, device: torch.device) -> Verdict | None:
    """The verdict kept for this device, these versions and these sources."""
    return Verdict.of_row(disk.read(path()).get(_key(subject, device)))


def forget() -> None:
    """Drop what this process remembers; the disk is left alone."""
    _known.clear()
    _later.clear()


def _check(checked: Checked, device: torch.device, how: str) -> Verdict:
    """Check here, or wait for the process that does."""
    subject, wait_s = checked.subject, own_process.limit_s()
    with own_process.alone(_key(subject, device), env.cache_dir(), wait_s) as mine:
        if how == "first" and (kept := load(subject, device)):
            spills.refresh(device)
            return _remember(subject, device, kept)
        if not mine:
            raise OutOfMemory(f"another process has been checking it for {wait_s:g} s")
        return _remember(subject, device, renew(checked, device))


def _tell_later(subject: KernelId, device: torch.device, reason: str) -> None:
    warnings.warn(
        f"fused_lora does without {subject} on {device} for {AGAIN_S / 60:g} minutes: it is not "
        f"checked yet, and {reason}.",
        RuntimeWarning,
        stacklevel=2,
    )


def _remember(subject: KernelId, device: torch.device, found: Verdict) -> Verdict:
    _known[subject, device] = found
    if not found.passed:
        warnings.warn(
            f"fused_lora does not use {subject} on {device}: {found}. The next backend serves; "
            "`fused-lora selftest` shows every kernel.",
            RuntimeWarning,
            stacklevel=2,
        )
    return found


def _key(subject: KernelId, device: torch.device) -> str:
    of = _compiled() if subject.backend == "cuda" else ""
    return f"{subject}|{identity(device)}|checks {_checks()}{of}"


@lru_cache(maxsize=1)
def _checks() -> str:
    return sources(Path(__file__).parent)


@lru_cache(maxsize=1)
def _compiled() -> str:
    """The compiled module by its build, and what launches it: another file is another kernel."""
    built = Path(str(native.load().__file__)).stat()
    launchers = sources(Path(native.__file__).parent)
    return f"|module {built.st_size} {built.st_mtime_ns} {launchers}"
