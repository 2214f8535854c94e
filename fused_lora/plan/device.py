"""What a device can do: the ceilings a cost is measured against.

The table holds achievable rates (about 80 % of the data sheet's dense figures, without sparsity),
not peaks. A device that is not in it is measured once and the figures are kept on disk.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from fused_lora import disk

FILE = "ceilings.json"


@dataclass(frozen=True)
class Ceilings:
    """Rates of one device in one dtype."""

    name: str  # the device's own name
    dtype: str  # the dtype the matmul rate holds for
    matmul_gflops: float  # large library GEMM
    half_rank: float  # the inner or outer dimension at which a GEMM reaches half that rate
    bandwidth_gbs: float  # bytes read and written by a copy, per second
    call_us: float  # host cost of one library call
    measured: bool  # on this machine, rather than taken from the table
    gap_us: float | None = None  # between two launches that are queued; None: nothing queues them


# name fragment: (fp32, tf32, 16-bit) GFLOP/s, bandwidth GB/s. The first fragment found serves.
KNOWN_GPUS: dict[str, tuple[float, float, float, float]] = {
    "B200": (62_000, 900_000, 1_800_000, 6_400),
    "GH200": (50_000, 390_000, 790_000, 3_200),
    "H200": (50_000, 390_000, 790_000, 4_300),
    "H100 PCIe": (40_000, 300_000, 600_000, 1_600),
    "H100": (50_000, 390_000, 790_000, 2_700),
    "A100": (15_600, 125_000, 250_000, 1_600),
    "A10": (25_000, 50_000, 100_000, 480),
    "L40S": (70_000, 140_000, 290_000, 690),
    "L4": (24_000, 48_000, 97_000, 240),
    "RTX 4090": (66_000, 66_000, 132_000, 800),
    "RTX 3090": (28_000, 28_000, 57_000, 750),
}
GPU_HALF_RANK = 32.0  # half a tensor-core tile of 64
GPU_CALL_US = 5.0  # of the host, which works while the device does
GPU_GAP_US = 1.5  # of the device, from one queued launch to the next
UNMEASURED_CPU = (100.0, 8.0, 20.0, 3.0)  # GFLOP/s, half rank, GB/s, us: for FUSED_LORA_CALIBRATE=0


def known(name: str, dtype: str) -> Ceilings | None:
    """The table's row for the GPU called ``name``, if it has one."""
    words = name.replace("-", " ") + " "
    if "Laptop" in words or "MIG" in words:  # other chips, or parts of one
        return None
    for fragment, (fp32, tf32, half, bandwidth) in KNOWN_GPUS.items():
        if f"{fragment} " in words:
            rates = {"float64": fp32 / 2, "float32": fp32, "tf32": tf32}
            figures = (rates.get(dtype, half), GPU_HALF_RANK, bandwidth, GPU_CALL_US)
            return Ceilings(name, dtype, *figures, False, GPU_GAP_US)
    return None


def unmeasured(name: str, dtype: str, kind: str = "cpu") -> Ceilings:
    """Figures of a small machine of ``kind``, where it cannot be measured."""
    if kind == "cuda":
        fp32, tf32, half, bandwidth = KNOWN_GPUS["A10"]
        rate = {"float64": fp32 / 32, "float32": fp32, "tf32": tf32}.get(dtype, half)
        figures = (rate, GPU_HALF_RANK, bandwidth, GPU_CALL_US)
        return Ceilings(name, dtype, *figures, False, GPU_GAP_US)
    gflops, half_rank, bandwidth, call_us = UNMEASURED_CPU
    return Ceilings(name, dtype, gflops, half_rank, bandwidth, call_us, False)


def load(folder: Path, key: str) -> Ceilings | None:
    """The ceilings kept under ``key``; None when absent, torn or of another layout."""
    try:
        found = Ceilings(**disk.read(folder / FILE)[key])
        rates = [found.matmul_gflops, found.half_rank, found.bandwidth_gbs, found.call_us]
        rates += [] if found.gap_us is None else [found.gap_us]
        return found if all(0 < float(rate) < float("inf") for rate in rates) else None
    except (ValueError, KeyError, TypeError):
        return None


def store(folder: Path, key: str, ceilings: Ceilings) -> None:
    """Keep ``ceilings`` under ``key``; a folder that cannot be written is passed over."""
    disk.merge(folder / FILE, {key: asdict(ceilings)})
