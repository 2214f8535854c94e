"""Who may import whom: the order of rooms of DESIGN.md section 5, read from every source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "fused_lora"

FLOORS: list[set[str]] = [
    {"types", "arguments", "env", "version", "disk", "worker"},
    {"reference", "plan", "programs"},
    {"kernels"},
    {"verify"},
    {"ops"},
    {"nn"},
    {"io", "patching"},
    {"distill"},
    {"cli"},
]
SIDE_ROOMS = {"bench", "testing"}  # may import anything; only the cli may import them,
JUDGES = {"verify"}  # and a room that judges at run time may import testing
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
BACKENDS = {"aten", "triton", "cuda"}
AT_IMPORT = {"torch"}  # third parties that may be imported by importing a module
TRITON_ROOM = ["fused_lora", "kernels", "triton"]  # a jitted function finds triton in its module
WITHOUT_TRITON = {
    "available",
    "identity",
    "launch",
    "launches",
    "tiles",
    "spills",
    "winners",
}  # in that room, importable without
LATE = {"triton", "timm", "transformers", "peft", "safetensors", "torchvision", "numpy"} | {
    *("sklearn", "tqdm", "tomli", "PIL", "datasets", "tensorboard"),
    "segmentation_models_pytorch",
}


def module_name(path: Path) -> str:
    """``fused_lora.plan.choose`` of its file."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, at_import: bool = True) -> Iterator[tuple[str, bool]]:
    """Every imported name, and whether importing the module imports it."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from ((f"{node.module}.{alias.name}", at_import) for alias in node.names)
        elif not _is_type_checking(node):
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports(node, at_import and not inside)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def room_of(name: str) -> str:
    """``plan`` of ``fused_lora.plan.choose``; empty for the package itself."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else ""


def complaint(module: str, name: str, at_import: bool) -> str | None:
    """Why ``module`` may not import ``name``; None when it may."""
    party = name.split(".")[0]
    if name.startswith("fused_lora._native") and at_import:
        return "the compiled module is imported inside the function that uses it"
    if _holds_triton(name) and at_import and not _holds_triton(module):
        return "kernels in triton are imported inside the function that launches them"
    if party != "fused_lora":
        if party == "triton" and _holds_triton(module):
            return None
        if party in LATE and at_import and room_of(module) not in SIDE_ROOMS:
            return f"{party} is imported inside the function that uses it"
        return "plan never sees a tensor" if party == "torch" and _in(module, "plan") else None
    return None if module == "fused_lora" else _room_complaint(module, name)


def _holds_triton(name: str) -> bool:
    """Whether ``name`` lies in a module of the triton room whose import imports triton."""
    parts = name.split(".")
    return parts[:3] == TRITON_ROOM and len(parts) > 3 and parts[3] not in WITHOUT_TRITON


def _in(module: str, room: str) -> bool:
    return room_of(module) == room


def _room_complaint(module: str, name: str) -> str | None:
    mine, other = room_of(module), room_of(name)
    if mine == other:
        return _backend_complaint(module, name) if mine == "kernels" else None
    if mine in SIDE_ROOMS or name == "fused_lora._native":
        return None
    if other == "testing" and mine in JUDGES:
        return None
    if other in SIDE_ROOMS:
        return None if mine == "cli" else f"only the cli may import {other}"
    if other not in FLOOR_OF:
        return None if mine == "cli" else "importing the package itself is a circle"
    if FLOOR_OF[other] >= FLOOR_OF[mine]:
        return f"{other} does not stand below {mine}"
    return None


def _backend_complaint(module: str, name: str) -> str | None:
    backends = [set(path.split(".")[2:3]) & BACKENDS for path in (module, name)]
    mine, other = backends
    return f"{mine} and {other} are ignorant of each other" if mine and other - mine else None


def complaints(module: str, source: str) -> list[str]:
    """Every violation in one source."""
    found = imports(ast.parse(source))
    said = ((name, complaint(module, name, at_import)) for name, at_import in found)
    return [f"{module} imports {name}: {why}" for name, why in said if why]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=module_name)
def test_imports_go_down(path: Path) -> None:
    module = module_name(path)
    room = room_of(module)
    assert room in {"", *FLOOR_OF, *SIDE_ROOMS}, f"{room} is not a room of DESIGN.md"
    assert not complaints(module, path.read_text())


@pytest.mark.parametrize(
    "module, source, why",
    [
        ("fused_lora.plan.choose", "import torch", "plan never sees"),
        ("fused_lora.plan.choose", "def f():\n    from torch import Tensor", "plan never sees"),
        (
            "fused_lora.plan.choose",
            "from fused_lora.reference import philox",
            "does not stand below",
        ),
        ("fused_lora.reference.philox", "import fused_lora.plan", "does not stand below"),
        ("fused_lora.ops.lora_linear", "from fused_lora import nn", "does not stand below"),
        ("fused_lora.io.peft", "from fused_lora.patching import walk", "does not stand below"),
        ("fused_lora.nn.linear", "import fused_lora", "circle"),
        ("fused_lora.types", "from fused_lora import env", "does not stand below"),
        ("fused_lora.ops.x", "from fused_lora.testing import truth", "only the cli"),
        ("fused_lora.verify.x", "from fused_lora.bench import clock", "only the cli"),
        ("fused_lora.verify.x", "from fused_lora.ops import planning", "does not stand below"),
        ("fused_lora.distill.x", "from fused_lora.bench import judge", "only the cli"),
        ("fused_lora.distill.x", "from sklearn.cluster import KMeans", "inside the function"),
        ("fused_lora.patching.x", "from fused_lora.distill import stack", "does not stand below"),
        ("fused_lora.kernels.aten.x", "from fused_lora.kernels.cuda import native", "ignorant"),
        ("fused_lora.kernels.triton", "import triton", "inside the function"),
        ("fused_lora.kernels.triton.tiles", "import triton.language as tl", "inside the function"),
        ("fused_lora.kernels.cuda.x", "import triton", "inside the function"),
        ("fused_lora.ops.x", "from fused_lora.kernels.triton import x", "launches them"),
        ("fused_lora.kernels.triton.tiles", "import fused_lora.kernels.triton.x", "launches them"),
        ("fused_lora", "import safetensors.torch", "inside the function"),
        ("fused_lora.kernels.cuda.x", "from fused_lora import _native", "inside the function"),
        ("fused_lora.io.x", "try:\n    import peft\nexcept ImportError: pass", "inside the func"),
    ],
)
def test_violations_are_caught(module: str, source: str, why: str) -> None:
    (only,) = complaints(module, source)
    assert why in only


@pytest.mark.parametrize(
    "module, source",
    [
        ("fused_lora", "from fused_lora.distill import losses"),
        (
            "fused_lora.nn.linear",
            "import torch\nfrom fused_lora.ops.lora_linear import lora_linear",
        ),
        ("fused_lora.kernels.aten.x", "from fused_lora.kernels.interface import Adapters"),
        ("fused_lora.kernels.triton.x", "import triton.language as tl"),
        ("fused_lora.kernels.triton.tiles", "def f():\n    import triton"),
        ("fused_lora.ops.x", "def f():\n    from fused_lora.kernels.triton import x"),
        ("fused_lora.ops.x", "from fused_lora.kernels.triton import available"),
        ("fused_lora.cli", "from fused_lora.bench import table"),
        ("fused_lora.verify.x", "from fused_lora.testing.yardstick import judge"),
        ("fused_lora.bench.x", "import timm\nfrom fused_lora.patching import patch"),
        ("fused_lora.patching.x", "if TYPE_CHECKING:\n    import timm"),
    ],
)
def test_the_rest_is_allowed(module: str, source: str) -> None:
    assert not complaints(module, source)
