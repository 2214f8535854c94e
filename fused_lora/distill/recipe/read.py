"""A recipe from a TOML file, with overrides from the command line."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fused_lora.distill.recipe.tables import (
    Data,
    Evaluate,
    Family,
    Loss,
    Recipe,
    RecipeError,
    SladTable,
    Student,
    Table,
    Teacher,
    Train,
    unknown,
)

TABLES: dict[str, type[Table]] = {
    kind.TITLE: kind for kind in (Teacher, Student, Data, Loss, Train, Evaluate, SladTable, Family)
}
FILES = (
    ("teacher", "checkpoint"),
    ("teacher", "recipe"),
    ("slad", "checkpoint"),
    ("slad", "recipe"),
    ("family", "checkpoint"),
    ("family", "recipe"),
    ("data", "path"),
)


def read(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe in ``path``.

    Args:
        path: a TOML file; files that it names are looked for from its folder.
        overrides: "table.key=value", the value in TOML, or a bare word for a string.

    Raises:
        RecipeError: no such file, no TOML, or a key unknown, of a wrong type or out of range.
    """
    path = Path(path)
    if not path.is_file():
        raise RecipeError(f"no recipe {str(path)!r}")
    given = _parsed(path.read_text(encoding="utf-8"), str(path))
    for override in overrides:
        _apply(given, override)
    try:
        return of(_anchored(given, path.parent))
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None


def of(given: dict[str, Any]) -> Recipe:
    """The recipe of a parsed dict."""
    known = ["method", *TABLES]
    for key in given:
        if key not in known:
            raise RecipeError(unknown("a recipe", key, known))
    given = {name: table for name, table in given.items() if table is not None}
    tables = {name: kind.of(given[name]) for name, kind in TABLES.items() if name in given}
    method = {"method": given["method"]} if "method" in given else {}
    return Recipe(**method, **tables)


def plain(recipe: Table) -> dict[str, Any]:
    """The recipe as nested dicts, every default spelled out."""
    return dataclasses.asdict(recipe)


def _parsed(text: str, where: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib  # of the extra "distill"
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{where} is no TOML: {error}") from None


def _apply(given: dict[str, Any], override: str) -> None:
    name, sign, value = override.partition("=")
    *tables, key = name.strip().split(".")
    if not sign or not key or not all(tables):
        raise RecipeError(f"an override reads table.key=value, got {override!r}")
    for table in tables:
        given = given.setdefault(table, {})
        if not isinstance(given, dict):
            raise RecipeError(f"override {override!r}: {table} is no table")
    given[key] = _value(value.strip())


def _value(text: str) -> Any:
    try:
        return _parsed(f"value = {text}", "")["value"]
    except RecipeError:
        return text


def _anchored(given: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Relative files of the recipe, from its own folder."""
    given = dict(given)
    for table, key in FILES:
        part = given.get(table)
        if isinstance(part, dict) and isinstance(name := part.get(key), str) and name:
            if name.startswith("$"):
                continue  # from the environment, when the data are read
            given[table] = part | {key: str(folder / name)}
    return given
