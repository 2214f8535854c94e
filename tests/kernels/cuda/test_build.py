"""What CMake builds of an architecture list: TORCH_CUDA_ARCH_LIST=9.0 has the Hopper product."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import CSRC, digest

ROOT = CSRC.parent
BUILD = [ROOT / "CMakeLists.txt", *sorted((ROOT / "build_support").glob("*.py"))]
PRODUCTS = 96  # kernels of lora_linear_sm90: tiles, activations and how w lies, in two types


def cmake() -> str:
    """One that the project's file takes; pip's, or the system's."""
    beside = str(Path(sys.executable).parent)
    for path in (beside, os.environ["PATH"]):
        found = shutil.which("cmake", path=path)
        if found is None:
            continue
        said = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
        if tuple(map(int, re.findall(r"\d+", said)[:2])) >= (3, 26):
            return found
    pytest.skip("no cmake of 3.26 or later")


def configured(folder: Path, archs: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Configure a build for ``TORCH_CUDA_ARCH_LIST=archs`` as setup.py does; what CMake said."""
    cmake_build = pytest.importorskip("build_support.cmake_build")
    pybind11 = pytest.importorskip("pybind11")
    nvcc = cmake_build.find_nvcc()
    if nvcc is None or shutil.which("ninja") is None:
        pytest.skip("no nvcc or no ninja")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", archs)
    listed = ";".join(cmake_build.wanted_archs(nvcc))
    command = [
        *(cmake(), "-G", "Ninja", "-S", str(ROOT), "-B", str(folder)),
        *("-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_CUDA_COMPILER={nvcc}"),
        *(f"-DCMAKE_CUDA_ARCHITECTURES={listed}", f"-DPython_EXECUTABLE={sys.executable}"),
        *(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DFUSED_LORA_MODULE_DIR={folder}"),
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout + done.stderr


def built(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The module for 9.0 alone; kept until a source changes."""
    sources = digest(CSRC) + "".join(path.read_text() for path in BUILD)
    name = hashlib.sha256(sources.encode()).hexdigest()[:16]
    folder = request.config.cache.mkdir("native") / f"module-9.0-{name}"
    if not (folder / "built").exists():
        configured(folder, "9.0", monkeypatch)
        subprocess.run([cmake(), "--build", str(folder), "--parallel", "2"], check=True)
        (folder / "built").touch()
    (module,) = folder.glob("_native*.so")
    return module


def disassembled(module: Path) -> dict[str, str]:
    """The machine code of every kernel, by its name."""
    triton = pytest.importorskip("triton", reason="cuobjdump comes with triton")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [str(tool), "-sass", str(module)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    parts = re.split(r"\n\s*Function : ", said)[1:]
    return {name.strip(): code for name, _, code in (part.partition("\n") for part in parts)}


@pytest.mark.slow
def test_a_module_for_9_0_has_the_hopper_product(request, monkeypatch) -> None:
    code = disassembled(built(request, monkeypatch))
    products = {name: text for name, text in code.items() if "lora_linear_kernel" in name}
    assert len(products) == PRODUCTS
    for name, text in products.items():
        assert "HGMMA" in text and "UTMALDG" in text, name  # wgmma, and copies by the engine


def test_a_module_without_sm_90a_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = " ".join(configured(tmp_path / "a", "8.0;12.0", monkeypatch).split())
    assert "lora_linear_sm90 is compiled without sm_90a" in said
    assert "compiled without" not in configured(tmp_path / "b", "9.0;10.0", monkeypatch)
    flags = (tmp_path / "b" / "build.ninja").read_text()
    assert "compute_100a" in flags and "compute_90a" in flags
    assert not re.search(r"compute_(90|100)\b", flags)
    assert "FUSED_LORA_SM90A" in flags
    assert "FUSED_LORA_SM90A" not in (tmp_path / "a" / "build.ninja").read_text()
