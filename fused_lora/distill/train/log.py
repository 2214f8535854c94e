"""What a run says: lines of JSON or TensorBoard, and a progress bar for people."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Protocol


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


def bar(steps: int, done: int, title: str, speaks: bool) -> Any:
    """A progress bar, on a terminal only."""
    from tqdm import tqdm

    return tqdm(total=steps, initial=done, desc=title, disable=not (speaks and sys.stderr.isatty()))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # half a line of a killed run
