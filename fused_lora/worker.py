"""A process beside this one, for work that may hang, abort or spoil its device.

    this process   Worker.call("module", "function", arguments, limit_s)   pickled, through a pipe
    the other one  python -m fused_lora.worker                             a line of JSON for each

The other process is started when first needed, by ``python -m`` and never by a fork or from the
caller's main module; it ends when it is idle, when this one does, or with what it was given. Its
standard output and error are no answers: answers have a pipe of their own.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

START_S = 120.0  # for an interpreter that imports torch from a slow disk
IDLE_S = 20.0  # after which an idle process ends: it holds memory of the device
GRACE_S = 5.0  # for the end of a process that was killed
READY, BEGUN = "ready", "begun"
_HEAD = struct.Struct("!Q")


class WorkerError(Exception):
    """The call has no answer. The sentence says why."""


class CannotStart(WorkerError):
    """There is no process to ask: nothing is known of what was to be done."""


class TimedOut(WorkerError):
    """It took longer than its limit, and was killed."""


class Died(WorkerError):
    """The process ended in the middle of it, by a signal or an exit of its own."""


class Killed(WorkerError):
    """Somebody else ended the process, such as a system that is short of memory."""


class Worker:
    """One process, started when it is first asked; one call at a time."""

    def __init__(self, idle_s: float = IDLE_S, start_s: float = START_S) -> None:
        self._idle_s, self._start_s = idle_s, start_s
        self._turn = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0  # the process that started it: a fork of it has none
        self._requests = self._answers = -1
        self._buffer = b""
        self._said: Any = None  # what it writes to its standard error

    def call(self, module: str, function: str, args: Sequence[Any], limit_s: float) -> Any:
        """What ``module.function(*args)`` gives there, of what JSON holds.

        Raises:
            WorkerError: one of its kinds, for want of an answer.
        """
        request = pickle.dumps((module, function, tuple(args), limit_s))
        with self._turn:
            for _ in range(2):  # an idle process may end just now
                self._start()
                if self._send(request) and self._line(GRACE_S + self._start_s) == BEGUN:
                    return self._answer(limit_s)
                self.close()
            raise CannotStart("the process for it ended before it began")

    def close(self) -> None:
        """End the process and its children, whatever they do."""
        process, self._process = self._process, None
        if process is None:
            return
        ours = self._owner == os.getpid()
        if ours and process.poll() is None:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)  # a session of its own
            with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in a driver
                process.wait(GRACE_S)
        for handle in (self._requests, self._answers):
            with contextlib.suppress(OSError):
                os.close(handle)
        self._said.close()
        self._buffer = b""

    def _answer(self, limit_s: float) -> Any:
        line = self._line(limit_s)
        if line is None:
            self.close()
            raise TimedOut(f"did not end within {limit_s:g} s and was killed")
        if not line:
            raise self._end()
        answer = json.loads(line)
        if answer.get("leaves"):
            self.close()
        return answer["result"]

    def _start(self) -> None:
        """A process that is ready for a call."""
        if self._process is not None:
            if self._owner == os.getpid() and self._process.poll() is None:
                return
            self.close()
        theirs, self._requests = os.pipe()
        self._answers, answers = os.pipe()
        self._said = tempfile.TemporaryFile()  # noqa: SIM115, closed with the process
        self._owner = os.getpid()
        command = [sys.executable or "python3", "-m", "fused_lora.worker"]
        try:
            self._process = subprocess.Popen(
                [*command, str(theirs), str(answers), str(self._idle_s)],
                pass_fds=(theirs, answers),
                stdin=subprocess.DEVNULL,
                stdout=self._said,
                stderr=self._said,
                env=environment(),
                start_new_session=True,
            )
        except OSError as error:
            for handle in (self._requests, self._answers):
                os.close(handle)
            self._said.close()
            raise CannotStart(f"no process can be started: {error}") from None
        finally:
            os.close(theirs)
            os.close(answers)
        if (line := self._line(self._start_s)) != READY:
            why = f"was not ready within {self._start_s:g} s"
            how = str(self._end()) if line == "" else why
            self.close()
            raise CannotStart(f"the process for it {how}")

    def _send(self, request: bytes) -> bool:
        try:
            with open(self._requests, "wb", closefd=False) as pipe:
                pipe.write(_HEAD.pack(len(request)) + request)
        except OSError:  # it has just ended
            return False
        return True

    def _line(self, limit_s: float) -> str | None:
        """The next whole line; empty at the end of them, None at the end of the time."""
        until = time.monotonic() + limit_s
        poll = select.poll()
        poll.register(self._answers, select.POLLIN)
        while b"\n" not in self._buffer:
            left_ms = int(1000 * (until - time.monotonic()))
            if left_ms <= 0 or not poll.poll(left_ms):
                if time.monotonic() >= until:
                    return None
                continue
            if not (read := os.read(self._answers, 1 << 16)):
                return ""
            self._buffer += read
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode()

    def _end(self) -> WorkerError:
        """How the process ended that answers no more."""
        process = self._process
        assert process is not None
        try:
            status = process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            status = 0
        last_line = self._last_words()
        self.close()
        if status == -signal.SIGKILL:
            return Killed(f"was killed from outside{last_line}")
        if status == -signal.SIGALRM:
            return TimedOut("did not end within its time and was killed")
        if status < 0:
            return Died(f"ended its process by {signal.Signals(-status).name}{last_line}")
        return Died(f"ended its process with status {status}{last_line}")

    def _last_words(self) -> str:
        self._said.seek(0, os.SEEK_END)
        self._said.seek(max(0, self._said.tell() - 4096))
        lines = self._said.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f" ({last[:200]})" if last else ""


def environment() -> dict[str, str]:
    """What lets another interpreter import what this one does, and from no working directory."""
    found = [str(Path(__file__).resolve().parent.parent), *filter(None, sys.path)]
    paths = os.pathsep.join(dict.fromkeys(map(os.path.abspath, found)))
    return os.environ | {"PYTHONPATH": paths, "PYTHONSAFEPATH": "1"}


class Leave:
    """A result after which the process is of no use any more."""

    def __init__(self, result: Any) -> None:
        self.result = result


def serve(requests: int, answers: int, idle_s: float) -> None:
    """Answer until nobody asks; what takes too long ends the process, whoever holds the GIL."""

    def say(line: str) -> None:
        os.write(answers, line.encode() + b"\n")

    say(READY)
    with open(requests, "rb") as source:
        while select.select([source], [], [], idle_s)[0] and (head := source.read(_HEAD.size)):
            request = source.read(*_HEAD.unpack(head))
            say(BEGUN)
            module, function, args, limit_s = pickle.loads(request)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(max(1, int(limit_s + GRACE_S)))
            result = getattr(importlib.import_module(module), function)(*args)
            signal.alarm(0)
            leaves = isinstance(result, Leave)
            say(json.dumps({"result": result.result if leaves else result, "leaves": leaves}))
            if leaves:
                return


if __name__ == "__main__":
    from fused_lora import worker  # by its name, as what it calls knows it

    worker.serve(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
    os._exit(0)  # a device in an odd state may not be let go of
