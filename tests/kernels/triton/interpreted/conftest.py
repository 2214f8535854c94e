"""These tests run where TRITON_INTERPRET is set, in processes that test_interpreted.py starts."""

from __future__ import annotations

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]

if INTERPRETED:
    from tests.kernels.triton import interpreter

    interpreter.install()

    from tests.kernels.triton.interpreted.serving import as_written, checking, serving  # noqa: F401
