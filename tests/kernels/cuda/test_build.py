"""What CMake builds of an architecture list: TORCH_CUDA_ARCH_LIST=9.0 has the Hopper product.

The module that ``make install`` builds for every architecture is looked at, and nothing is compiled
again: for 9.0 alone CMake compiles the product by the same commands, which is asked of it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from build_support.archs import DEFAULT
from fused_lora.kernels.cuda.lora_extended import TILES

from .conftest import CSRC, disassembled

ROOT = CSRC.parent
PRODUCTS = len(TILES) * 3 * 2 * 2  # kernels: tiles, activations, how w lies, types


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


@pytest.mark.slow
def test_the_module_has_the_hopper_product(installed: Path) -> None:
    code = disassembled(installed, "sm_90a")
    products = {name: text for name, text in code.items() if "lora_linear_kernel" in name}
    assert len(products) == PRODUCTS
    for name, text in products.items():
        assert "HGMMA" in text and "UTMALDG" in text, name  # wgmma, and copies by the engine
    forms = {}  # a form's products and waits, alike in both types: ptxas is asked about one alone
    for name, text in products.items():
        dtype, form = re.search(r"_kernelINS_(8BFloat16|7Float16)E(\w+)", name).groups()
        counts = [text.count(word) for word in ("HGMMA", "WARPGROUP.ARRIVE", "WARPGROUP.DEPBAR")]
        forms.setdefault(form, {})[dtype] = counts
    assert len(forms) == PRODUCTS // 2
    assert all(
        one["8BFloat16"] == one["7Float16"] and all(one["7Float16"]) for one in forms.values()
    )


def test_a_module_without_sm_90a_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = " ".join(configured(tmp_path / "a", "8.0;12.0", monkeypatch).split())
    assert "lora_linear_sm90 is compiled without sm_90a" in said
    assert "FUSED_LORA_SM90A" not in ninja(tmp_path / "a")


def test_9_0_alone_compiles_the_product_as_every_architecture_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []
    for name, archs in (("alone", "9.0"), ("every", DEFAULT)):
        assert "compiled without" not in configured(tmp_path / name, archs, monkeypatch)
        flags = ninja(tmp_path / name)
        assert "compute_90a" in flags and not re.search(r"compute_(90|100)\b", flags)
        commands.append(re.findall(r"\nbuild (\S+/lora_linear_sm90/\S+): (.+\n(?:  .+\n)+)", flags))
    assert "compute_100a" in flags and "compute_80" in flags
    alone, every = commands
    assert len(alone) == 4 and all("FUSED_LORA_SM90A" in edge for _, edge in alone)
    assert alone == every


def ninja(folder: Path) -> str:
    """Every command of a build."""
    return (folder / "build.ninja").read_text()
