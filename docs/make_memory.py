"""Write the table of docs/memory.md: gigabytes that the blocks of known models keep, by method.

python docs/make_memory.py docs/memory.md
"""

from __future__ import annotations

import sys
from pathlib import Path

from fused_lora.bench.shapes import SHAPES
from fused_lora.bench.table import markdown_table

BEGIN, END = "<!-- memory:begin -->\n", "<!-- memory:end -->"
DEPTHS = {"vit_small_patch16_224": 12, "vit_base_patch16_224": 12, "vit_large_patch16_224": 24}
BATCHES, RANKS = (8, 64, 256), (16, 256)

# [M, d] tensors that a block keeps in one precision: those without an adapter, and how many [M, R]
# there are beside them. tests/bench/test_docs_memory.py holds both to the rows of saved_bytes.
UNITS = {
    "frozen": ("frozen network", 10.0, 0),
    "naive": ("naive LoRA", 16.0, 6),
    "fused_block": ("`patch(model)`", 10.0, 6),
    "fused_block_gemm": ('`recompute="gemm"`', 3.0, 0),
}


def units(method: str, rank: int, width: int) -> float:
    """[M, d] tensors that a block keeps."""
    _, whole, low = UNITS[method]
    return whole + low * rank / width


def table() -> str:
    """A line for each model, number of images and rank."""
    heads = ["model", "images", "rank", *(title for title, _, _ in UNITS.values())]
    lines = []
    for name, depth in DEPTHS.items():
        shape = SHAPES[name]
        for batch in BATCHES:
            unit = depth * batch * shape.tokens * shape.width * 2 / 1e9  # GB
            for rank in RANKS:
                kept = [f"{units(method, rank, shape.width) * unit:.1f}" for method in UNITS]
                lines.append([f"`{name}`", str(batch), str(rank), *kept])
    return markdown_table(heads, lines) + "\n"


def main(path: Path) -> None:
    """Rewrite what stands between the marks."""
    head, rest = path.read_text().split(BEGIN)
    path.write_text(head + BEGIN + table() + END + rest.split(END)[1])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
