"""The table of families: ``python -m fused_lora.testing.families.table docs/families.md``."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from fused_lora.testing.families.sweep import LIBRARIES, Outcome, families, outcome

PACKAGES = ("torch", "timm", "transformers", "torchvision")
HEAD = """# Families

What `fused_lora.patch` does with one small model of every family of vision transformers that can
be built offline. *Served* means: the output and every adapter gradient equal naive LoRA's on the
same roles, in float64 to 1e-7 and in fp32 by the yardstick (DESIGN.md section 3). *Read* counts the
weights that the model reads without calling their module; adapters go into those (w' = w + s b a).
*Joint*: the columns of q, k and v are no ranges, so `qkv="joint"` is asked for, by an error that
says so. Written by `python -m fused_lora.testing.families.table docs/families.md`.
"""


def versions() -> str:
    """The releases a table holds for."""
    return "With " + ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES) + "."


def page(outcomes: Iterable[Outcome]) -> str:
    """The whole document."""
    outcomes = list(outcomes)
    parts = [HEAD + "\n" + versions()]
    for library in LIBRARIES:
        rows = [_row(each) for each in outcomes if each.library == library]
        head = "| family | model | | roles | linears | read |\n|---|---|---|---|---|---|"
        parts.append("\n".join([f"## {library}\n", head, *rows]))
    return "\n\n".join(parts) + "\n"


def _row(each: Outcome) -> str:
    if each.refusal:
        return f"| {each.family} | {each.model} | refused | {_short(each.refusal)} | | |"
    how = "served" if each.qkv == "separate" else "served, joint"
    roles = ", ".join(each.roles)
    read = each.read or ""
    return f"| {each.family} | {each.model} | {how} | {roles} | {each.linears} | {read} |"


def _short(refusal: str) -> str:
    """The reason, without what the caller asked for and what the model has."""
    _, _, reason = refusal.partition(": ")
    return (reason or refusal).partition(";")[0]


def main(path: str) -> int:
    """Write the page; 1 if a family is neither served nor refused."""
    outcomes = [outcome(library, family) for library, family in families()]
    Path(path).write_text(page(outcomes))
    wrong = [f"{each.library} {each.family}" for each in outcomes if not each.passed]
    print(f"{len(outcomes)} families, wrong: {wrong or 'none'}")
    return bool(wrong)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
