"""What a run says: lines of JSON or TensorBoard, and a progress bar for people."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol


class Log(Protocol):
    """Takes figures by step."""

    def write(self, step: int, figures: dict[str, float]) -> None:
        """One line."""

    def close(self) -> None:
        """The end."""


class JsonLines:
    """``log.jsonl``: one object per line; a run taken up at ``step`` drops what came after it."""

    def __init__(self, path: Path, step: int) -> None:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        kept = [line for line in lines if _step_of(line) <= step]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self.file = path.open("a", encoding="utf-8")

    def write(self, step: int, figures: dict[str, float]) -> None:
        """One line, on disk at once."""
        self.file.write(json.dumps({"step": step} | figures) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class TensorBoard:
    """Event files in ``tensorboard/``."""

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError("train.log = 'tensorboard' needs the tensorboard package") from None
        self.writer = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, step: int, figures: dict[str, float]) -> None:
        """One scalar each."""
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush."""
        self.writer.close()


class Silence:
    """For the processes that do not speak."""

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def log_of(kind: str, folder: Path, step: int, speaks: bool) -> Log:
    """The log of a run taken up after ``step``."""
    if not speaks:
        return Silence()
    if kind == "tensorboard":
        return TensorBoard(folder / "tensorboard", step)
    return JsonLines(folder / "log.jsonl", step)


class StepProgress:
    """Where a run is: a bar on a terminal, elsewhere a line now and then, both on stderr.

    Args:
        steps: of the run.
        done: how many of them an earlier process did.
        images: of one step, of all processes.
        title: the first word of a line.
        speaks: False says nothing.
        clock_s: a clock in seconds.
    """

    LINE_EVERY_S = 30.0

    def __init__(
        self,
        steps: int,
        done: int,
        images: int,
        title: str,
        speaks: bool,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        from tqdm import tqdm

        self.steps, self.done, self.images, self.title = steps, done, images, title
        self.clock_s, self.loss = clock_s, math.nan
        self.begun, self.begun_s = done, clock_s()
        self.lines = speaks and not sys.stderr.isatty()
        self.said_s = self.begun_s - self.LINE_EVERY_S + 5  # the first line after five seconds
        off = self.lines or not speaks
        self.bar = tqdm(total=steps, initial=done, desc=title, disable=off, unit="step")

    def update(self) -> None:
        """One step is done."""
        self.done += 1
        self.bar.update()
        now_s = self.clock_s()
        if self.lines and now_s - self.said_s >= self.LINE_EVERY_S:
            self.said_s = now_s
            print(self.text(), file=sys.stderr, flush=True)

    def show(self, loss: float) -> None:
        """The newest mean loss."""
        self.loss = loss
        self.bar.set_postfix_str(f"loss {loss:.4g}, {self.rate():.1f} images/s", refresh=False)

    def rate(self) -> float:
        """Images a second since the process began."""
        passed_s = self.clock_s() - self.begun_s
        return self.images * (self.done - self.begun) / passed_s if passed_s > 0 else math.nan

    def text(self) -> str:
        """One line: steps, loss, images a second, time left."""
        rate = self.rate()
        known = rate > 0
        left_s = round((self.steps - self.done) * self.images / rate) if known else 0
        left = f"{left_s // 3600}:{left_s // 60 % 60:02d}:{left_s % 60:02d}" if known else "?"
        loss = "" if math.isnan(self.loss) else f"loss {self.loss:.4g}, "
        place = f"{self.title}: step {self.done} of {self.steps}"
        return f"{place}, {loss}{rate:.1f} images/s, {left} left"

    def close(self) -> None:
        """The end; the last line where there are lines and anything was done."""
        self.bar.close()
        if self.lines and self.done > self.begun:
            print(self.text(), file=sys.stderr, flush=True)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # half a line of a killed run
