"""Every kernel on every default architecture: no spills, and how much of a chip one block takes.

Read off the installed module's machine code, which is compiled once for all tests; what ptxas alone
says, that products of sm_90 wait for each other, it is asked for the source that has them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from build_support.archs import DEFAULT, cmake_archs

from .conftest import CSRC, cuobjdump, digest, disassembled


def has_kernels(source: Path) -> bool:
    """Whether ``source`` holds kernels, or takes them from its folder's kernels.h."""
    text = source.read_text()
    return "__global__" in text or "/kernels.h" in text


ARCHS = [entry.removesuffix("-real") for entry in cmake_archs(DEFAULT)]
SOURCES = sorted(path for path in CSRC.glob("*/*.cu") if has_kernels(path))
PRODUCTS = CSRC / "lora_linear_sm90" / "kernels_bfloat16.cu"
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


def serves(source: Path, arch: str) -> bool:
    """Whether ``source`` has code for ``arch``: a folder may name the only one."""
    return arch == "90a" if source.parent.name.endswith("_sm90") else True


@pytest.mark.slow
def test_no_kernel_spills(installed: Path) -> None:
    """No stack frame, which is where spilled registers would be."""
    _, *parts = re.split(r"\narch = ", cuobjdump("-res-usage", str(installed)))
    usage = r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    kernels: dict[str, list[tuple[str, ...]]] = {}
    for part in parts:
        kernels.setdefault(part.split("\n")[0].strip(), []).extend(re.findall(usage, part))
    assert kernels.keys() >= {f"sm_{arch}" for arch in ARCHS}
    for arch, found in kernels.items():
        names = {name for name, *_ in found}
        for stem in ("lora_grad", "lora_merge", "add_partials", "lora_linear"):
            assert any(stem in name for name in names) == (
                stem != "lora_linear" or arch == "sm_90a"
            )
        registers, stack, shared, local = zip(
            *(map(int, sizes) for _, *sizes in found), strict=True
        )
        print(f"{arch}: {len(found)} kernels, at most {max(registers)} registers, "
              f"{max(shared)} bytes of shared memory")  # fmt: skip
        assert not any(stack) and not any(local), f"spills on {arch}: {found}"
        assert max(shared) <= SMEM_LIMIT_BYTES


@pytest.mark.slow
def test_products_of_sm_90_do_not_wait(request: pytest.FixtureRequest) -> None:
    """Of bfloat16; test_build.py compares those of float16 with them."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    report = ptxas_report(nvcc, PRODUCTS, "90a", request.config.cache.mkdir("native"))
    assert "Compiling entry function" in report and "(C75" not in report, report


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
def test_the_gradients_copy_as_their_architecture_can(installed: Path) -> None:
    """Bulk copies on sm_90 and later alone, 16 bytes at a time before; never both."""
    for arch in ("sm_80", "sm_90a"):
        kernels = disassembled(installed, arch).items()
        code = "".join(text for name, text in kernels if "lora_grad_kernel" in name)
        assert ("UBLKCP" in code, "LDGSTS" in code) == (arch == "sm_90a", arch == "sm_80")


@pytest.mark.slow
def test_a_cluster_of_products_multicasts_and_has_no_fence_in_its_loop(
    request: pytest.FixtureRequest,
) -> None:
    """Fences of the whole GPU come with its two meetings alone, at either end of a kernel."""
    code = machine_code(request, PRODUCTS, "90a")
    _, *kernels = re.split(r"\.section\s+\.text\.", code)
    sizes = [re.search(r"LinearTileILi\d+ELi\d+ELi(\d)E", name) for name in kernels]
    clusters = [int(size[1]) for size in sizes if size]
    assert len(clusters) == len(kernels) and set(clusters) == {1, 2}
    for cluster, kernel in zip(clusters, kernels, strict=True):
        assert ("UTMALDG.2D.MULTICAST" in kernel) == (cluster == 2)
        assert kernel.count("MEMBAR.ALL.GPU") == (2 if cluster == 2 else 0)
