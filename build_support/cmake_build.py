"""A setuptools build_ext that lets CMake and ninja build the compiled module."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

from build_support.archs import DEFAULT, cmake_archs, known_to
from build_support.here import gpus

ROOT = Path(__file__).resolve().parent.parent
MODULE = "fused_lora._native"


def find_nvcc() -> str | None:
    """The compiler of CUDA_HOME, else the one on PATH, else the one where CUDA installs itself."""
    if home := os.environ.get("CUDA_HOME"):
        return shutil.which("nvcc", path=str(Path(home) / "bin"))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def wanted_archs(nvcc: str) -> list[str]:
    """What the user asks for; by default, every default architecture that this nvcc knows."""
    if asked := os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip():
        return cmake_archs(asked)
    listed = run([nvcc, "--list-gpu-arch"], stdout=subprocess.PIPE, text=True).stdout
    return known_to(listed, cmake_archs(";".join(_here()) or DEFAULT))


def _here() -> list[str]:
    """The GPUs of this machine, where nothing else is asked for."""
    return gpus() if os.environ.get("FUSED_LORA_NATIVE", "").strip() == "here" else []


def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run one command; setuptools forgives the CompileError of an optional extension."""
    print(" ".join(command), flush=True)
    try:
        return subprocess.run(command, check=True, **options)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CompileError(f"the compiled module could not be built: {error}") from error


def native_extensions() -> list[Extension]:
    """The compiled module, or nothing and a printed reason, as FUSED_LORA_NATIVE says."""
    asked = os.environ.get("FUSED_LORA_NATIVE", "").strip()
    if asked not in {"", "0", "1", "here"}:
        raise SystemExit(f"FUSED_LORA_NATIVE is {asked!r}; it may be 0, 1, here or unset")
    if asked == "0":
        return _pure_python("FUSED_LORA_NATIVE=0")
    if asked == "here" and not os.environ.get("TORCH_CUDA_ARCH_LIST") and not gpus():
        return _pure_python("FUSED_LORA_NATIVE=here, and nvidia-smi lists no GPU")
    if find_nvcc() is None:
        reason = f"nvcc is not in CUDA_HOME ({os.environ.get('CUDA_HOME', 'unset')}) nor on PATH"
        if asked == "1":
            raise SystemExit(f"FUSED_LORA_NATIVE=1, but {reason}")
        return _pure_python(reason)
    return [Extension(MODULE, sources=[], optional=asked != "1")]


def _pure_python(reason: str) -> list[Extension]:
    print(f"fused_lora: installing without the compiled module: {reason}", file=sys.stderr)
    return []


class CMakeBuild(build_ext):
    """Configures and builds one CMake project into the place setuptools expects."""

    def build_extension(self, ext: Extension) -> None:
        """Build ``ext``; a failure of an optional extension is caught by setuptools."""
        import pybind11

        nvcc = find_nvcc()
        assert nvcc is not None
        # In the tree, so that the next build compiles what has changed and nothing else.
        folder = str(ROOT / "build" / f"native-{sys.implementation.cache_tag}")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        configure = [
            *("cmake", "-G", "Ninja", "-S", str(ROOT), "-B", folder),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            f"-DCMAKE_CUDA_COMPILER={nvcc}",
            f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(wanted_archs(nvcc))}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DFUSED_LORA_MODULE_DIR={target.parent}",
            f"-DFUSED_LORA_MODULE_FILE={target.name}",
            f"-DFUSED_LORA_NVCC_THREADS={jobs}",
        ]
        run(configure)
        run(["cmake", "--build", folder, "--parallel", jobs])
