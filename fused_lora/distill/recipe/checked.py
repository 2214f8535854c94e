"""Tables that check themselves: each field's type and range stand beside its default."""

from __future__ import annotations

import math
from dataclasses import Field, dataclass, field, fields
from difflib import get_close_matches
from typing import Any, ClassVar


class RecipeError(ValueError):
    """A recipe that cannot be run, with the key and the value seen."""


def number(default: float, least: float = -math.inf, most: float = math.inf) -> Any:
    """A number between ``least`` and ``most``, both allowed; whole where the default is."""
    return field(default=default, metadata={"least": least, "most": most})


def word(default: str, *of: str) -> Any:
    """One of the words ``of``."""
    return field(default=default, metadata={"of": of})


def names() -> Any:
    """A list of strings, empty if not given."""
    return field(default=())


@dataclass(frozen=True)
class Table:
    """One table of a recipe."""

    TITLE: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            where = f"{self.TITLE}.{each.name}" if self.TITLE else each.name
            object.__setattr__(self, each.name, _checked(where, value, each))

    @classmethod
    def of(cls, given: Any) -> Any:
        """The table of a parsed dict; raises RecipeError for a key that is none of its own."""
        if not isinstance(given, dict):
            raise RecipeError(f"{cls.TITLE} must be a table, got {given!r}")
        known = [each.name for each in fields(cls)]
        for key in given:
            if key not in known:
                raise RecipeError(unknown(f"[{cls.TITLE}]", key, known))
        return cls(**given)


def unknown(where: str, key: str, known: list[str]) -> str:
    """The sentence on a key that does not exist."""
    near = get_close_matches(key, known, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"its keys are {known}"
    return f"{where} has no key {key!r}; {hint}"


def _checked(where: str, value: Any, about: Field[Any]) -> Any:
    default = about.default
    if isinstance(default, tuple):
        return _strings(where, value)
    if isinstance(default, bool | str):
        if type(value) is not type(default):
            raise RecipeError(f"{where} must be a {_called(default)}, got {value!r}")
    elif isinstance(default, int | float):
        value = _number(where, value, default)
        _check_range(where, value, about.metadata)
    if (of := about.metadata.get("of")) and value not in of:
        raise RecipeError(f"{where} must be one of {list(of)}, got {value!r}")
    return value


def _strings(where: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(each, str) for each in value):
        raise RecipeError(f"{where} must be a list of strings, got {value!r}")
    return tuple(value)


def _number(where: str, value: Any, default: float) -> float:
    kinds = (int,) if isinstance(default, int) else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise RecipeError(f"{where} must be a {_called(default)}, got {value!r}")
    return type(default)(value)


def _check_range(where: str, value: float, limits: Any) -> None:
    least, most = limits.get("least", -math.inf), limits.get("most", math.inf)
    if not least <= value <= most or math.isinf(value):
        raise RecipeError(f"{where} must lie in [{least:g}, {most:g}], got {value!r}")


def _called(default: object) -> str:
    kinds = {bool: "true or false", str: "string", int: "whole number", float: "number"}
    return kinds[type(default)]
