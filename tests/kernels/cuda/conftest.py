"""``host``: the native sources built by a C++ compiler alone, kernels running on the CPU;
``installed``: the module as ``make install`` compiles it, whose machine code is looked at.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

from build_support.archs import DEFAULT, cmake_archs
from fused_lora.kernels.cuda import native

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"


def digest(*folders: Path) -> str:
    """Of every source below ``folders``: the name of what is built from them."""
    files = sorted(p for folder in folders for p in folder.rglob("*") if p.is_file())
    sources = [p for p in files if p.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    return hashlib.sha256(b"".join(p.read_bytes() for p in sources)).hexdigest()[:16]


def build_host(folder: Path) -> Path:
    """Compile bindings, checks and the CPU launch into a module, once for all processes of a run;
    skip without a compiler."""
    compiler = cxx()
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is not installed")
    python_include = sysconfig.get_path("include")
    if not Path(python_include, "Python.h").exists():
        pytest.skip("Python's headers are not installed")
    name = f"host_{digest(CSRC, HERE)}_{sys.implementation.cache_tag}"
    target = folder / name / "_native.so"
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            compile_host(compiler, [python_include, pybind11.get_include()], target)
    return target


def cxx() -> str:
    """The C++ compiler; skip where there is none."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    return compiler


def compile_host(
    compiler: str, includes: list[str], target: Path, sources: list[Path] | None = None
) -> None:
    """The module ``target`` of ``sources``, else of all, as many at once as there are cores.

    What is found in ``includes`` goes before the library's own headers.
    """
    sources = sources or [*sorted(CSRC.glob("*/*.cpp")), *sorted(HERE.glob("*.cpp"))]
    # Fibers jump between stacks, which a fortified longjmp takes for an error.
    options = ["-std=c++17", "-O1", "-U_FORTIFY_SOURCE", "-ffp-contract=off", "-fPIC"]
    # A misaligned access, which this processor forgives and a GPU does not, ends the process.
    options += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
    options += ["-Wall", "-Wextra", "-Werror", '-DFUSED_LORA_ARCHS="none"']
    options += [f"-I{path}" for path in (*includes, CSRC, HERE)]
    partial = target.with_suffix(f".{os.getpid()}")
    objects = [partial.with_name(f"{partial.name}.{source.stem}.o") for source in sources]

    def compile_one(source: Path, to: Path) -> None:
        subprocess.run([compiler, *options, "-c", str(source), "-o", str(to)], check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources, objects))
    subprocess.run([compiler, "-shared", *map(str, objects), "-o", str(partial)], check=True)
    for file in objects:
        file.unlink()
    partial.replace(target)


@pytest.fixture(scope="session")
def host(request: pytest.FixtureRequest) -> ModuleType:
    """The compiled module with its kernels on the CPU."""
    path = build_host(request.config.cache.mkdir("native"))
    spec = importlib.util.spec_from_file_location("_native", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def installed() -> Path:
    """The compiled module; skip unless it is of these sources and every default architecture."""
    if reason := native.why_not_here():
        pytest.skip(reason)
    if missing := set(cmake_archs(DEFAULT)) - set(native.archs()):
        pytest.skip(f"the installed module has no code for {sorted(missing)}: make install")
    module = Path(native.load().__file__)
    sources = [CSRC.parent / "CMakeLists.txt", *CSRC.rglob("*.*")]
    if newer := [p.name for p in sources if p.stat().st_mtime > module.stat().st_mtime]:
        pytest.skip(f"the installed module is older than {newer}: make install")
    return module


def cuobjdump(*arguments: str) -> str:
    """What the tool says of machine code."""
    triton = pytest.importorskip("triton", reason="cuobjdump comes with triton")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run(
        [str(tool), *arguments], check=True, capture_output=True, text=True
    ).stdout


def disassembled(module: Path, arch: str) -> dict[str, str]:
    """The machine code of every kernel for ``arch``, by its name."""
    parts = re.split(r"\n\s*Function : ", cuobjdump("-sass", "-arch", arch, str(module)))[1:]
    return {name.strip(): code for name, _, code in (part.partition("\n") for part in parts)}
