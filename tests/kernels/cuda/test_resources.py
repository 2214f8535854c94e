"""Every kernel on every default architecture: no spills, and how much of a chip one block takes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from build_support.archs import DEFAULT, cmake_archs

from .conftest import CSRC, digest


def has_kernels(source: Path) -> bool:
    """Whether ``source`` holds kernels, or takes them from its folder's kernels.h."""
    text = source.read_text()
    return "__global__" in text or "/kernels.h" in text


ARCHS = [entry.removesuffix("-real") for entry in cmake_archs(DEFAULT)]
SOURCES = sorted(path for path in CSRC.glob("*/*.cu") if has_kernels(path))
SMEM_LIMIT_BYTES = 48 << 10  # what a kernel gets without asking; test_lora_grad.py and
# test_lora_extended.py see to what others ask for


def ptxas_report(nvcc: str, source: Path, arch: str, folder: Path) -> str:
    """What ptxas says of each kernel; kept under the hash of all sources."""
    kept = folder / f"{source.stem}_{arch}_{digest(CSRC)}.txt"
    if not kept.exists():
        cubin = kept.with_suffix(f".{os.getpid()}")
        command = [
            *(nvcc, "-std=c++17", "--expt-relaxed-constexpr", "-Xptxas", "-v", "-cubin"),
            *("-gencode", f"arch=compute_{arch},code=sm_{arch}", "-I", str(CSRC)),
            *(str(source), "-o", str(cubin)),
        ]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        cubin.replace(kept.with_suffix(".cubin"))
        cubin.write_text(said)
        cubin.replace(kept)  # whole, or not there: other processes look for it
    return kept.read_text()


def numbers(report: str, pattern: str) -> list[int]:
    return [int(found) for found in re.findall(pattern, report)]


def serves(source: Path, arch: str) -> bool:
    """Whether ``source`` has code for ``arch``: a folder may name the only one."""
    return arch == "90a" if source.parent.name.endswith("_sm90") else True


@pytest.mark.slow
def test_no_kernel_spills(request: pytest.FixtureRequest) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    folder = request.config.cache.mkdir("native")
    jobs = [(source, arch) for source in SOURCES for arch in ARCHS if serves(source, arch)]
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(lambda job: ptxas_report(nvcc, *job, folder), jobs))
    for (source, arch), report in zip(jobs, reports, strict=True):
        registers = numbers(report, r"Used (\d+) registers")
        smem_bytes = numbers(report, r"(\d+) bytes smem")
        smem = max(smem_bytes, default=0)
        print(f"{source.stem} sm_{arch}: {len(registers)} kernels, at most {max(registers)} "
              f"registers, {smem} bytes of shared memory")  # fmt: skip
        spills = numbers(report, r"(\d+) bytes spill (?:stores|loads)")
        assert len(spills) == 2 * len(registers)
        assert not any(spills), f"{source.name} spills on sm_{arch}:\n{report}"
        assert not any(numbers(report, r"(\d+) bytes stack frame")), report
        assert smem <= SMEM_LIMIT_BYTES
        assert "(C75" not in report, f"{source.name}: products of sm_{arch} wait:\n{report}"


def machine_code(request: pytest.FixtureRequest, source: Path, arch: str) -> str:
    """Of every kernel of ``source``, disassembled."""
    triton = pytest.importorskip("triton", reason="nvdisasm comes with triton")
    nvcc, tools = shutil.which("nvcc"), Path(triton.__file__).parent / "backends/nvidia/bin"
    if nvcc is None or not (tools / "nvdisasm").exists():
        pytest.skip("no nvcc or no nvdisasm")
    folder = request.config.cache.mkdir("native")
    ptxas_report(nvcc, source, arch, folder)
    cubin = folder / f"{source.stem}_{arch}_{digest(CSRC)}.cubin"
    command = [str(tools / "nvdisasm"), "-c", str(cubin)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_the_gradients_copy_as_their_architecture_can(request: pytest.FixtureRequest) -> None:
    """Bulk copies on sm_90 and later alone, 16 bytes at a time before; never both."""
    for arch in ("80", "90a"):
        code = machine_code(request, CSRC / "lora_grad" / "lora_grad.cu", arch)
        assert ("UBLKCP" in code, "LDGSTS" in code) == (arch == "90a", arch == "80")


@pytest.mark.slow
def test_a_cluster_of_products_multicasts_and_has_no_fence_in_its_loop(
    request: pytest.FixtureRequest,
) -> None:
    """Fences of the whole GPU come with its two meetings alone, at either end of a kernel."""
    code = machine_code(request, CSRC / "lora_linear_sm90" / "kernels_bfloat16.cu", "90a")
    _, *kernels = re.split(r"\.section\s+\.text\.", code)
    sizes = [re.search(r"LinearTileILi\d+ELi\d+ELi(\d)E", name) for name in kernels]
    clusters = [int(size[1]) for size in sizes if size]
    assert len(clusters) == len(kernels) and set(clusters) == {1, 2}
    for cluster, kernel in zip(clusters, kernels, strict=True):
        assert ("UTMALDG.2D.MULTICAST" in kernel) == (cluster == 2)
        assert kernel.count("MEMBAR.ALL.GPU") == (2 if cluster == 2 else 0)
