"""A progress bar on stderr; plain lines when nobody is watching a terminal."""

from __future__ import annotations

import sys
import time
from typing import TextIO

WIDTH = 24  # cells of the bar


class Progress:
    """Counts cases done and says what is going on; ``tell`` may be called at any rate."""

    def __init__(self, total: int, stream: TextIO | None = None, live: bool | None = None) -> None:
        self.total, self.done = total, 0
        self.stream = stream or sys.stderr
        self._live = self.stream.isatty() if live is None else live
        self._begin = time.monotonic()

    def tell(self, words: str) -> None:
        """Redraw the bar with ``words`` behind it; silent off a terminal."""
        if self._live:
            full = WIDTH * self.done // max(self.total, 1)
            bar = "#" * full + "." * (WIDTH - full)
            self.stream.write(f"\r\x1b[2K[{bar}] {self._elapsed()} {words}"[:110])
            self.stream.flush()

    def advance(self, words: str) -> None:
        """One more case is done; off a terminal this is the line that is printed."""
        self.done += 1
        self.tell(words)
        if not self._live:
            self.stream.write(f"[{self.done}/{self.total}] {self._elapsed()} {words}\n")
            self.stream.flush()

    def close(self) -> None:
        """Leave a clean line behind."""
        if self._live:
            self.stream.write("\r\x1b[2K")

    def _elapsed(self) -> str:
        return f"{time.monotonic() - self._begin:5.0f} s"
