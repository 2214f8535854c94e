"""``host``: the native sources built by a C++ compiler alone, kernels running on the CPU."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"


def digest(*folders: Path) -> str:
    """Of every source below ``folders``: the name of what is built from them."""
    files = sorted(p for folder in folders for p in folder.rglob("*") if p.is_file())
    sources = [p for p in files if p.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    return hashlib.sha256(b"".join(p.read_bytes() for p in sources)).hexdigest()[:16]


def build_host(folder: Path) -> Path:
    """Compile bindings, checks and the CPU launch into a module; skip without a compiler."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is not installed")
    python_include = sysconfig.get_path("include")
    if not Path(python_include, "Python.h").exists():
        pytest.skip("Python's headers are not installed")
    name = f"host_{digest(CSRC, HERE)}_{sys.implementation.cache_tag}"
    target = folder / name / "_native.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    sources = [*sorted(CSRC.glob("*/*.cpp")), *sorted(HERE.glob("*.cpp"))]
    includes = [f"-I{path}" for path in (CSRC, HERE, python_include, pybind11.get_include())]
    # Fibers jump between stacks, which a fortified longjmp takes for an error.
    options = ["-std=c++17", "-O1", "-U_FORTIFY_SOURCE", "-ffp-contract=off", "-fPIC"]
    # A misaligned access, which this processor forgives and a GPU does not, ends the process.
    options += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
    options += ["-Wall", "-Wextra", "-Werror", '-DFUSED_LORA_ARCHS="none"', *includes]
    partial = target.with_suffix(f".{os.getpid()}")
    objects = [partial.with_name(f"{partial.name}.{source.stem}.o") for source in sources]

    def compile_one(source: Path, to: Path) -> None:
        subprocess.run([compiler, *options, "-c", str(source), "-o", str(to)], check=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, sources, objects))
    subprocess.run([compiler, "-shared", *map(str, objects), "-o", str(partial)], check=True)
    for file in objects:
        file.unlink()
    return partial.replace(target)


@pytest.fixture(scope="session")
def host(request: pytest.FixtureRequest) -> ModuleType:
    """The compiled module with its kernels on the CPU."""
    path = build_host(request.config.cache.mkdir("native"))
    spec = importlib.util.spec_from_file_location("_native", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
