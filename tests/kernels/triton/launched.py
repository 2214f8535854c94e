"""Every launch that ships, launched over the stub driver on one chip.

    python -m tests.kernels.triton.launched bf16 90

Prints a line for each launch that is refused, or that Triton has no room for on the chip, and at
the end how many were launched and how many tensor maps were made.
"""

from __future__ import annotations

import sys

import torch

from fused_lora.kernels.triton import lora_linear_fp8, tiles
from tests.kernels.triton import shipped, stub
from tests.kernels.triton.matrix import KINDS, fp32_products


def main(kind: str, arch: int) -> None:
    """See above."""
    torch.set_num_threads(1)
    for module in (tiles, lora_linear_fp8):
        module.architecture = lambda device: arch
    driver = stub.serve(arch)
    x = torch.zeros(shipped.M, shipped.K, dtype=KINDS[kind])
    with fp32_products("tf32" if kind == "tf32" else "ieee"):
        for launch in shipped.all_launches(x, arch):
            try:
                launch.run()
            except Exception as error:
                name = f"{launch.kernel}: {shipped.words(launch.tile)}"
                print(f"refused {name}: {type(error).__name__}: {error}".replace("\n", " "))
    print(f"launched {driver.launches} maps {driver.maps}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
