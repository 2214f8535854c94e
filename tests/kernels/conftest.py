"""Long tests of kernels go first: a minute's test that a run ends with leaves other cores idle."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Columns of the compile matrix and machine code, interpreted files; then all else in order."""
    items.sort(key=lambda item: not _long(item))


def _long(item: pytest.Item) -> bool:
    slow = item.get_closest_marker("slow") is not None and "kernels" in item.path.parts
    return slow or item.path.name == "test_interpreted.py"
