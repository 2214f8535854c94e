"""What keeps the package easy to enter: no import circles, one class a name, few files, habits."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter

import pytest

from fused_lora import env
from fused_lora.version import __version__
from tests.test_layers import PACKAGE, imports, module_name

ROOT = PACKAGE.parent
SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
FILES = {  # of each room at most, without its __init__ files
    "bench": 30,
    "distill": 27,
    "io": 9,
    "kernels/aten": 4,
    "kernels/cuda": 7,
    "kernels/triton": 17,
    "nn": 16,
    "ops": 22,
    "patching": 14,
    "plan": 6,
    "programs": 9,
    "verify": 7,
}
README_LINES = 150
HOOKS = ".pre-commit-config.yaml"


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
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


def test_pre_commit_runs_what_make_lint_runs() -> None:
    lint = _text("Makefile").partition("\nlint:")[2].partition("\n\n")[0]
    tools = re.findall(r"\$\(BIN\)/(\S+)", lint)
    assert tools == [entry.split()[0] for entry in re.findall(r"entry: (.+)", _text(HOOKS))]
    assert set(tools) == {"ruff", "clang-format", "typos", "mypy"}


def test_the_citation_is_of_this_version() -> None:
    version, released = re.search(r"^## \[(\S+)\] - (\S+)$", _text("CHANGELOG.md"), re.M).groups()
    assert version == __version__
    assert f"\nversion: {version}\ndate-released: {released}\n" in _text("CITATION.cff")


def test_the_issue_template_asks_for_what_there_is() -> None:
    from fused_lora.cli import main

    asked = _text(".github/ISSUE_TEMPLATE/bug.md")
    variables = re.findall(r"FUSED_LORA_\w+", asked)
    assert variables and set(variables) <= set(env.VARIABLES)
    for command in re.findall(r"`fused-lora (\w+)`", asked):
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])


def test_the_table_of_steps_leads_to_code() -> None:
    lines = _text("CONTRIBUTING.md").partition("| step |")[2].partition("\n\n")[0].splitlines()
    heads = ("fused_lora/kernels/aten/lora_linear.py", "fused_lora/kernels/triton", "csrc")
    torch_code = _text(heads[0])
    for line in lines[2:]:
        for folder, cell in zip(heads, line.split("|")[2:], strict=False):
            for name in re.findall(r"`([^`]+)`", cell):
                if "." not in name:
                    assert f"def {name}(" in torch_code, name
                else:
                    assert (ROOT / name).is_file() or (ROOT / folder / name).is_file(), name


def _text(path: str) -> str:
    return (ROOT / path).read_text()
