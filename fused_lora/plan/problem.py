"""A problem in integers, one step of its work, and what a device does a second."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from fused_lora import disk
from fused_lora.types import DEFAULT_TRAITS, AdapterTraits, Gradient, Needs, Plan, Span

ITEMSIZE = {"float64": 8, "float32": 4, "tf32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Problem:
    """The shapes, the dtype and the gradients of one call."""

    m: int  # rows of x: batch x tokens
    k: int  # in_features
    n: int  # out_features
    spans: tuple[Span, ...]  # one per adapter
    dtype: str = "float32"  # what the GEMMs compute in: a key of ITEMSIZE
    bias: bool = True
    needs: Needs = Needs()
    bordered: bool = False  # this and the next eight: see ``fused_lora.types.FusionContext``
    activated: bool = False
    input_activated: bool = False
    shrunk: bool = False
    joined: bool = False
    packed_with: int = 1
    expanded: bool = False
    input_expanded: bool = False
    hidden_grad: bool = False
    traits: AdapterTraits = DEFAULT_TRAITS
    device: str = "cpu"  # its kind

    @cached_property
    def rank(self) -> int:
        """Stacked rank, sum of R_g."""
        return sum(span.rank for span in self.spans)

    @cached_property
    def itemsize(self) -> int:
        """Bytes per element."""
        return ITEMSIZE[self.dtype]

    @property
    def low_precision(self) -> bool:
        """Whether rounding y twice can hide the adapter's own signal (DESIGN.md section 3)."""
        return self.itemsize == 2

    @property
    def wide(self) -> str:
        """What w' is formed in."""
        return "float64" if self.dtype == "float64" else "float32"

    def casts(self, dtype: str = "") -> bool:
        """Whether a and b are of another dtype than ``dtype``, or than the products."""
        one, other = self.traits.dtype or self.dtype, dtype or self.dtype
        return one.replace("tf32", "float32") != other.replace("tf32", "float32")

    def scaled(self, g: int) -> bool:
        """Whether adapter g's s is not 1."""
        return bool(self.traits.scaled) and self.traits.scaled[g]

    @property
    def trains_adapters(self) -> bool:
        """Whether any adapter operand needs a gradient."""
        return self.needs.a or self.needs.b

    @property
    def trains(self) -> bool:
        """Whether there is a backward pass at all."""
        return self.trains_adapters or self.needs.x or self.needs.w or self.needs.bias


# What a device can do: the ceilings a cost is measured against.
#
# The table holds achievable rates (about 80 % of the data sheet's dense figures, without sparsity),
# not peaks. A device that is not in it is measured once and the figures are kept on disk.


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


@dataclass(frozen=True)
class Step:
    """One call: a GEMM of m x n x k, or, with k = 0, a pass over ``m * n`` elements."""

    name: str
    m: int
    n: int
    k: int = 0
    accumulates: bool = False  # reads its output as well
    extra_flops: int = 0  # beyond the GEMM's
    extra_elements: int = 0  # likewise, read or written
    efficiency: float = 1.0  # of its products, beside the library's
    calls: float = 1.0  # what a launch costs, in library calls
    host_calls: float | None = None  # what it costs the host, where that is another number

    @property
    def flops(self) -> int:
        """Multiply-adds, counted as two."""
        return 2 * self.m * self.n * self.k + self.extra_flops

    def elements(self) -> int:
        """Elements read and written."""
        if not self.k:
            return 2 * self.m * self.n + self.extra_elements
        result = (1 + self.accumulates) * self.m * self.n
        return self.m * self.k + self.k * self.n + result + self.extra_elements

    def time_us(self, itemsize: int, ceilings: Ceilings) -> float:
        """Estimated time: of the device alone where the host queues work for it."""
        inner = max(1, min(self.m, self.n, self.k or 1))
        rate = self.efficiency * ceilings.matmul_gflops * inner / (inner + ceilings.half_rank)
        compute_us = self.flops / rate * 1e-3
        memory_us = self.elements() * itemsize / ceilings.bandwidth_gbs * 1e-3
        between_us = ceilings.call_us if ceilings.gap_us is None else ceilings.gap_us
        return max(compute_us, memory_us) + self.calls * between_us

    def host_us(self, ceilings: Ceilings) -> float:
        """Estimated time of the host, where it queues work for a device; else 0."""
        if ceilings.gap_us is None:
            return 0.0
        return (self.calls if self.host_calls is None else self.host_calls) * ceilings.call_us


# Steps that plans of every backend have: dw, and what FULL makes of it; casts of adapters.


def full_steps(p: Problem, plan: Plan) -> Iterator[Step]:
    """dw where it is asked for or FULL wants it, then db and da from it."""
    full = plan.gradient is Gradient.FULL
    if p.needs.w:
        yield Step("dw", p.n, p.k, p.m)
    for g, span in enumerate(p.spans if full else ()):
        if not p.needs.w:
            yield Step("dw", span.width, p.k, p.m)
        if p.needs.b:
            yield from finished(p, Step("db", span.width, span.rank, p.k), p.scaled(g))
        if p.needs.a:
            yield from finished(p, Step("da", span.rank, p.k, span.width), p.scaled(g))


def cast_steps(p: Problem, dtype: str = "") -> Iterator[Step]:
    """a and b as ``dtype`` or the products have them."""
    for span in p.spans if p.casts(dtype) else ():
        yield Step("cast a", span.rank, p.k)
        yield Step("cast b", span.width, span.rank)


def finished(p: Problem, product: Step, scaled: bool) -> Iterator[Step]:
    """A gradient in its operand's dtype and scale; CUDA's accumulator is fp32 without a cast."""
    yield product
    widens = p.low_precision and p.traits.dtype == "float32" and p.device != "cpu"
    if p.casts() and not widens:
        yield Step(f"cast {product.name}", product.m, product.n)
    if scaled:
        yield Step(f"scale {product.name}", product.m, product.n)
