"""What the compiled kernels take of a chip and where their main loops spend cycles, as a table.

    python -m tests.kernels.kernel_report docs/kernel_report.md [--only CUDA] [--kernels lora_grad]

cuxray reads the machine code: registers, how many blocks share a processor, bank conflicts of the
shared-memory accesses whose addresses it can follow, and of the loop with most matrix instructions
the cycles that a warp issues and stalls by the compiler's own schedule, which leaves out waits for
memory. Nothing runs. Triton's kernels are those of ``shipped.py`` in bf16, each in every tile; the
compiled ones every form that has code.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from triton.backends import nvidia

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "build" / "kernel_report"
ARCHS = {80: "80", 89: "89", 90: "90a", 100: "100a", 120: "120a"}  # and as nvcc has them
VERIFIED = (80, 89, 90)  # whose schedules cuxray reads
# Before CUDA 13, as most of what Triton assembles, and since; both come with a Triton.
TOOLS = (
    ROOT / "build" / "triton-3.6" / "triton" / "backends" / "nvidia" / "bin",
    Path(nvidia.__path__[0]) / "bin",
)
MATRIX = re.compile(r"^(H|HG|I|IG|Q|QG|O)?MMA|^UTC\w*MMA|^WARPGROUP")
WHOSE = ["Triton", "CUDA"]
STORES = re.compile(r"^(STG|UTMASTG|UBLKCP\.G)")  # to device memory
SHARED = re.compile(r"^(LDS|STS|LDSM|STSM|LDGSTS|UBLKCP|UTMALDG|ATOMS)")


class Taken(NamedTuple):
    """One kernel as it is launched."""

    name: str
    what: str  # tile or form
    cubin: Path
    kernel: str  # in the cubin
    shared: int  # dynamic bytes


class Row(NamedTuple):
    """A line of the table."""

    name: str
    what: str
    registers: int
    shared: int
    blocks: int  # a processor
    warps: int  # likewise
    conflicts: str  # in the main loop
    cycles: int | None
    matrix: int | None
    memory: int | None  # of shared memory
    others: str


def triton_kernels(arch: int) -> Iterator[Taken]:
    """Every kernel that ships in every tile, once each."""
    os.environ["TRITON_CACHE_DIR"] = str(CACHE / "triton")
    from fused_lora.kernels.triton import lora_linear_fp8, tiles
    from tests.kernels.triton import shipped
    from tests.kernels.triton.compiler import compiled

    for module in (tiles, lora_linear_fp8):
        module.architecture = lambda device: arch
    seen = set()
    with compiled(arch, kept := []):
        x = torch.zeros(shipped.M, shipped.K, dtype=torch.bfloat16)
        for launch in shipped.all_launches(x, arch):
            if (which := (launch.kernel, shipped.words(launch.tile))) in seen:
                continue
            seen.add(which)
            before = len(kept)
            launch.run()
            for kernel in kept[before:]:
                yield taken(which, arch, kernel)


def taken(which: tuple[str, str], arch: int, kernel: Any) -> Taken:
    """A kernel of Triton's, its cubin in a file."""
    cubin = CACHE / f"{kernel.hash}.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    name = kernel.metadata.name
    return Taken(f"{which[0]}: {name.lstrip('_')}", which[1], cubin, name, kernel.metadata.shared)


def native_kernels(arch: int) -> Iterator[Taken]:
    """Every compiled kernel with code for the chip."""
    from fused_lora.kernels.cuda.lora_grad_shape import examples
    from fused_lora.kernels.cuda.native import Chip
    from tests.kernels.cuda.conftest import CSRC, digest
    from tests.kernels.cuda.test_resources import SOURCES, ptxas_report, serves

    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return
    shared = {}
    for tf32 in (False, True):
        for form, shape in examples(Chip(arch, 132), tf32).items():
            bytes_ = shape.plan(1, Chip(arch, 132)).smem_bytes
            shared.setdefault((tf32, *form[:3]), bytes_)
    for source in SOURCES:
        if not serves(source, ARCHS[arch]) or source.stem.endswith("_float16"):
            continue
        ptxas_report(nvcc, source, ARCHS[arch], CACHE)
        cubin = CACHE / f"{source.stem}_{ARCHS[arch]}_{digest(CSRC)}.cubin"
        for name in names(cubin):
            yield from native(name, cubin, shared)


def native(name: str, cubin: Path, shared: dict[Any, int]) -> Iterator[Taken]:
    """The kernel if it is of bf16 or TF32 and is launched."""
    readable = subprocess.run(["c++filt", name], capture_output=True, text=True).stdout
    found = re.search(r"(\w+)_kernel(<.*>)?\(", readable)
    assert found is not None, readable
    stem, parameters = found[1], (found[2] or "").replace("fused_lora::", "").strip("<>")
    if "Float16" in parameters.replace("BFloat16", ""):
        return
    if stem == "lora_grad":
        types, strips, blocks, forms = (p.strip() for p in parameters.split(","))
        key = (types == "TFloat32", int(strips), int(blocks), forms in ("true", "(bool)1"))
        if key not in shared:
            return
        words = f"{types} {strips} strips {16 * key[2]} ranks{'' if key[3] else ' given'}"
        yield Taken(stem, words, cubin, name, shared[key])
        return
    words = in_words(parameters) if parameters else ""
    yield Taken(stem, words, cubin, name, 227 << 10 if "linear" in stem else 0)


ENUMS = {
    "Rounding": ("to nearest", "stochastically"),
    "Right": ("w by rows", "w by columns"),
    "Activation": ("", "erf", "tanh"),
}


LINEAR_TILE = r"LinearTile<(\d+), (\d+), (\d+), (\(bool\)[01]|true|false)>"


def tile_in_words(found: re.Match[str]) -> str:
    """A tile of the compiled product, as its own ``str`` has it."""
    from fused_lora.kernels.cuda.lora_extended import ProductTile

    rows, columns, cluster = map(int, found.groups()[:3])
    tile = ProductTile(rows, columns, cluster, ping_pong=found[4] in ("(bool)1", "true"))
    return str(tile).replace(" x ", "x").replace(",", "")


def in_words(parameters: str) -> str:
    """Parameters of a template, as a table shows them."""
    parameters = re.sub(LINEAR_TILE, tile_in_words, parameters.replace("sm90::", ""))
    parameters = re.sub(r"\((\w+)\)(\d)", lambda m: ENUMS[m[1]][int(m[2])], parameters)
    return " ".join(p for p in parameters.split(", ") if p)


def names(cubin: Path) -> list[str]:
    """Of the kernels in a cubin."""
    from cuxray.parse import elf

    return sorted(elf.launch_dims(cubin.read_bytes()))


def row(kernel: Taken, arch: int, tools: Any) -> Row | None:
    """What cuxray finds; None for a kernel that a chip is never given."""
    from cuxray.analyze.access import analyze_accesses
    from cuxray.archspec import lookup
    from cuxray.occupancy import compute
    from cuxray.parse import cfgdot, ctrl, elf, resusage, sass

    path = str(kernel.cubin)
    index = next(i for i, name in elf.functions(kernel.cubin.read_bytes()) if name == kernel.kernel)
    only = ["-fun", str(index)]
    function = sass.parse_gi(tools.run("nvdisasm", ["-c", "-gi", *only, path])).functions
    function = function[kernel.kernel]
    if len(function.instructions) < 32:
        return None
    graph = cfgdot.parse(tools.run("nvdisasm", ["-cfg", *only, path])).get(kernel.kernel)
    used = resusage.parse(tools.run("cuobjdump", ["--dump-resource-usage", path]))[kernel.kernel]
    dims = elf.launch_dims(kernel.cubin.read_bytes())[kernel.kernel]
    block = dims["reqntid"] or dims["maxntid"]
    threads = block[0] * block[1] * block[2]
    static = max(0, used.shared - (1024 if arch >= 90 else 0))
    spec = lookup(f"sm_{ARCHS[arch]}")
    occupancy = compute(spec, used.reg, threads, static, kernel.shared)
    members = main_loop(function, graph)
    found = analyze_accesses(function, block)
    conflicts = of_conflicts(found, members)
    cycles: dict[str, int] = defaultdict(int)
    if arch in VERIFIED and members:
        dump = tools.run("cuobjdump", ["-sass", "-fun", kernel.kernel, path])
        controls = ctrl.parse_sass_controls(dump)[kernel.kernel]
        for each in function.instructions:
            if each.block in members and each.addr in controls:
                cycles[each.opcode.split(".")[0]] += max(controls[each.addr].stall, 1)
    matrix = sum(n for opcode, n in cycles.items() if MATRIX.match(opcode))
    memory = sum(n for opcode, n in cycles.items() if SHARED.match(opcode))
    others = sorted(cycles.items(), key=lambda item: -item[1])
    others = [o for o in others if not MATRIX.match(o[0]) and not SHARED.match(o[0])]
    shown = ", ".join(f"{opcode} {n}" for opcode, n in others[: int(os.environ.get("MOST", "4"))])
    timed = (sum(cycles.values()), matrix, memory) if cycles else (None, None, None)
    shared, resident = static + kernel.shared, occupancy.blocks_per_sm
    taken_of = (used.reg, shared, resident, resident * threads // 32)
    return Row(kernel.name, kernel.what, *taken_of, conflicts, *timed, shown)


def main_loop(function: Any, graph: Any) -> set[str]:
    """The blocks of the loop with most matrix instructions, the innermost of equals.

    A loop around products that also stores a result is one over tiles, not over K.
    """
    count: dict[str, int] = defaultdict(int)
    size: dict[str, int] = defaultdict(int)
    stores = set()
    for each in function.instructions:
        count[each.block] += bool(MATRIX.match(each.opcode))
        size[each.block] += 1
        if STORES.match(each.opcode):
            stores.add(each.block)

    def worth(members: set[str]) -> tuple[bool, int, int]:
        matrix = sum(count[b] for b in members)
        length = sum(size[b] for b in members)
        return (not members & stores, matrix, -length) if matrix else (False, 0, length)

    return max(loops(graph), key=worth, default=set()) if graph else set()


def loops(graph: Any) -> list[set[str]]:
    """Natural loops, merged by header, from the node that nothing leads to."""
    before: dict[str, list[str]] = defaultdict(list)
    after: dict[str, list[str]] = defaultdict(list)
    for one, other in graph.edges:
        before[other].append(one)
        after[one].append(other)
    entry = next((n for n in sorted(graph.nodes) if not before[n]), None)
    if entry is None:
        return []
    order, seen = [], {entry}
    stack = [(entry, iter(after[entry]))]
    while stack:
        node, rest = stack[-1]
        following = next((n for n in rest if n not in seen), None)
        if following is None:
            order.append(node)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(after[following])))
    order.reverse()
    dominators = {node: set(order) for node in order} | {entry: {entry}}
    changed = True
    while changed:
        changed = False
        for node in order[1:]:
            common = set.intersection(*(dominators[p] for p in before[node] if p in seen))
            if (found := common | {node}) != dominators[node]:
                dominators[node], changed = found, True
    members: dict[str, set[str]] = {}
    for tail in order:
        for header in after[tail]:
            if header in dominators[tail]:
                inside, work = members.setdefault(header, {header}), [tail]
                while work:
                    if (node := work.pop()) not in inside:
                        inside.add(node)
                        work += [p for p in before[node] if p in seen]
    return list(members.values())


def of_conflicts(found: dict[str, Any], members: set[str]) -> str:
    """Of the shared-memory accesses in the main loop: conflicting of followed, and not followed."""
    inside = [a for a in found["accesses"] if a["space"] == "shared" and a["block"] in members]
    wrong = [a for a in inside if a["verdict"] == "conflict"]
    ways = max((a["conflict_ways"] for a in wrong), default=1)
    lost = [a for a in found["unanalyzed"] if a.get("space") == "shared"]
    lost = [a for a in lost if a.get("block") in members]
    kinds = sorted({a["opcode"].split(".")[0] for a in wrong})
    said = f"{len(wrong)} of {len(inside)}"
    if wrong:
        said += f", {ways}-way ({' '.join(kinds)})"
    return said + (f", {len(lost)} not followed" if lost else "")


def disassembler(folder: Path) -> Any:
    """Of the CUDA tools in ``folder``, from where nothing is fetched."""
    import cuxray

    os.environ |= {"CUXRAY_NO_FETCH": "1", "CUXRAY_TOOLCHAIN": str(folder)}
    return cuxray.resolve(quiet=True)


def of_cuda_13(cubin: Path) -> bool:
    """Whether an assembler of CUDA 13 made it; each disassembler follows its own form alone."""
    return cubin.read_bytes()[8] >= 8


def rows(arch: int, only: str, pattern: str) -> list[Row]:
    """Of one chip, in a process that compiles for no other."""
    CACHE.mkdir(parents=True, exist_ok=True)
    kernels = list(triton_kernels(arch) if only == "Triton" else native_kernels(arch))
    kernels = [k for k in kernels if re.search(pattern, f"{k.name} {k.what}")]
    by_form = [disassembler(folder) for folder in TOOLS]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda k: row(k, arch, by_form[of_cuda_13(k.cubin)]), kernels))
    return list(dict.fromkeys(each for each in found if each is not None))


HEAD = [
    "kernel | tile or form | registers | shared memory | blocks, warps | conflicts",
    "cycles | matrix | shared | the rest, most first",
]


def table(found: list[Row], timed: bool) -> Iterator[str]:
    """In Markdown."""
    head = " | ".join(HEAD) if timed else HEAD[0]
    yield f"| {head} |"
    yield "|" + " --- |" * (head.count(" | ") + 1)
    for r in found:
        cells = [r.name, r.what, str(r.registers), str(r.shared)]
        cells += [f"{r.blocks}, {r.warps}", r.conflicts]
        if timed and r.cycles:
            share = lambda n, r=r: f"{n} ({100 * n // r.cycles} %)"  # noqa: E731
            cells += [str(r.cycles), share(r.matrix), share(r.memory), r.others]
        elif timed:
            cells += ["", "", "", ""]
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", choices=WHOSE, help="of whose kernels; else of all")
    parser.add_argument("--kernels", default="", help="a pattern of names")
    parser.add_argument("--arch", type=int, help="of one chip, to standard output")
    args = parser.parse_args()
    whose = [args.only] if args.only else WHOSE
    if args.arch:
        lines = table(rows(args.arch, whose[0], args.kernels), args.arch in VERIFIED)
        print("\n".join(lines))
        return
    for only, arch in product(whose, ARCHS):
        command = [sys.executable, "-m", "tests.kernels.kernel_report", str(args.file)]
        command += ["--arch", str(arch), "--only", only, "--kernels", args.kernels]
        said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        write(args.file, f"## {only}, sm_{arch}", said)


def write(file: Path, heading: str, lines: str) -> None:
    """The section of this heading; the others stay."""
    text = file.read_text() if file.exists() else ""
    before, found, after = text.partition(f"{heading}\n")
    following = after.partition("\n## ")
    rest = f"\n## {following[2]}" if following[1] else ""
    before = before if found or not before else before.rstrip("\n") + "\n\n"
    half = file.with_suffix(".half")
    half.write_text(f"{before}{heading}\n\n{lines}{rest}")
    half.replace(file)


if __name__ == "__main__":
    main()
