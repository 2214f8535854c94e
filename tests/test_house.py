"""What keeps the package easy to enter: no circle of imports, one class a name, few files."""

from __future__ import annotations

import ast
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter

import pytest

from tests.test_layers import PACKAGE, imports, module_name

SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
FILES = {  # of each room at most, without its __init__ files
    "bench": 30,
    "distill": 27,
    "io": 10,
    "nn": 17,
    "patching": 14,
    "programs": 9,
    "trust": 8,
}
README_LINES = 150


def circle(sources: dict[str, str]) -> list[str] | None:
    """Modules each of which imports the next one while it is imported itself."""
    graph = {}
    for module, source in sources.items():
        graph[module] = set()
        for name, at_import in imports(ast.parse(source)):
            target = name if name in sources else name.rpartition(".")[0]
            if at_import and target in sources and target != module:
                graph[module].add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def test_no_module_imports_itself_by_others() -> None:
    assert circle({module: path.read_text() for module, path in SOURCES.items()}) is None


def test_a_circle_would_be_found() -> None:
    apart = {"fused_lora.a": "from fused_lora.b import y", "fused_lora.b": "import torch"}
    assert circle(apart) is None
    assert circle(apart | {"fused_lora.b": "from fused_lora import a"})
    assert circle(apart | {"fused_lora.b": "def f():\n    from fused_lora import a"}) is None


def test_no_two_classes_have_one_name() -> None:
    at = defaultdict(list)
    for module, path in SOURCES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                at[node.name].append(module)
    assert not {name: modules for name, modules in at.items() if len(modules) > 1}


@pytest.mark.parametrize("room", FILES)
def test_a_room_has_few_files(room: str) -> None:
    files = [path for path in (PACKAGE / room).rglob("*.py") if path.name != "__init__.py"]
    assert len(files) <= FILES[room], "join what is read together"


def test_the_readme_is_one_screen() -> None:
    assert len((PACKAGE.parent / "README.md").read_text().splitlines()) <= README_LINES
