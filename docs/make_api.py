"""Writes api.md, the reference, from the docstrings of every public name."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import fused_lora

HEAD = "# Reference\n\nWritten by `python docs/make_api.py` from the docstrings.\n"


def signature(name: str, thing: Any) -> str:
    """``name(...)`` with its parameters as annotated; one to a line where they are many."""
    parameters = [
        p.replace(annotation=inspect.Parameter.empty)
        for p in inspect.signature(thing).parameters.values()
        if p.name not in ("self", "cls")
    ]
    return f"{name}{inspect.Signature(parameters)}"


def methods(thing: type) -> list[tuple[str, Any]]:
    """The public methods and properties with a docstring, a class's own and its parents' here."""
    found = {}
    for kind in reversed(thing.__mro__):
        if kind.__module__.startswith("fused_lora"):
            found |= {name: m for name, m in vars(kind).items() if not name.startswith("_")}
    named = sorted(found.items())
    return [(name, m) for name, m in named if inspect.getdoc(m) and not inspect.isclass(m)]


def entry(name: str, thing: Any) -> str:
    """One name's section."""
    title = name if inspect.isclass(thing) else signature(name, thing)
    lines = [f"## {name}", "", "```text", title, "", inspect.getdoc(thing) or "", "```"]
    if inspect.isclass(thing) and not issubclass(thing, Exception):
        for member, value in methods(thing):
            if callable(getattr(value, "__func__", value)) or isinstance(value, property):
                first = inspect.getdoc(value).split("\n\n")[0].replace("\n", " ")
                lines += ["" if lines[-1] == "```" else None, f"- `{member}`: {first}"]
    return "\n".join(line for line in lines if line is not None) + "\n"


def page() -> str:
    """The whole reference."""
    names = [name for name in sorted(fused_lora.__all__) if name != "__version__"]
    return "\n".join([HEAD, *(entry(name, getattr(fused_lora, name)) for name in names)])


if __name__ == "__main__":
    (Path(__file__).parent / "api.md").write_text(page())
