"""Seeing which operations run: nothing should pass a test by falling back in silence."""

from __future__ import annotations

from typing import Any

from fused_lora.nn import adapted, block_modules
from fused_lora.programs import run as programs


def operations(monkeypatch: Any, *kinds: type) -> list[Any]:
    """A list that grows by each operation of these kinds that runs from now on."""
    seen: list[Any] = []
    real = programs.run

    def run(program: Any, operation: Any, inputs: Any) -> Any:
        if isinstance(operation, kinds):
            seen.append(operation)
        return real(program, operation, inputs)

    for module in (programs, adapted, block_modules):
        monkeypatch.setattr(module, "run", run)
    return seen
