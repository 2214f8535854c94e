"""The shapes that are timed, each from a named model, and the grids of each kind of device."""

from __future__ import annotations

from dataclasses import dataclass

DTYPES = ("fp32", "bf16", "amp")  # amp: fp32 weights, bf16 autocast
MODES = ("eager", "graph")  # launched by the host, or replayed as a CUDA graph
CACHES = ("warm", "cold")  # what a GPU's L2 holds when a step begins


@dataclass(frozen=True)
class ModelShape:
    """A vision transformer as its projections see it."""

    name: str  # timm's name
    width: int  # d: columns of the residual stream
    tokens: int  # of one image, class token included
    expansion: int = 4  # hidden columns of the MLP over d


@dataclass(frozen=True)
class Grid:
    """What one run covers when the command line does not say."""

    models: tuple[str, ...]
    ranks: tuple[int, ...]
    batches: tuple[int, ...]
    dtypes: tuple[str, ...]
    methods: tuple[str, ...]
    one_image: tuple[str, ...]  # models given a single image instead of ``batches``
    budget_s: float  # for all cases together; the minimum of rounds is run whatever it says
    modes: tuple[str, ...] = MODES[:1]
    caches: tuple[str, ...] = CACHES[:1]
    one_rank: tuple[tuple[str, int], ...] = ()  # models and batches given the first rank alone


SHAPES = {
    shape.name: shape
    for shape in (
        ModelShape("vit_small_patch16_224", 384, 197),
        ModelShape("vit_base_patch16_224", 768, 197),
        ModelShape("vit_large_patch16_224", 1024, 197),
        ModelShape("vit_host", 48, 5),  # of suites/host.py: nothing but what the host does
        ModelShape("vit_small_patch14_dinov2", 384, 1370),
        ModelShape("vit_base_patch14_dinov2", 768, 1370),
    )
}

_SMALL_BASE = ("vit_small_patch16_224", "vit_base_patch16_224")
_RANKS = (4, 16, 64, 128, 256, 512)
_SIX = ("frozen", "naive", "naive_joint", "peft", "addmm", "fused", "fused_joint")
_STEP = ("frozen", "naive", "peft", "fused", "fused_joint")

_BLOCK = ("fused_block", "fused_block_gemm", "peft_checkpoint")
_PEFT = ("peft_bf16", "peft_checkpoint")
_KEPT = (*_STEP[:3], *_PEFT, *_STEP[3:], "fused_block_none", *_BLOCK[:2])
_COUNTED = Grid(_SMALL_BASE, (16, 256), (2,), DTYPES, _KEPT, (), 1)

_HOST = Grid(
    ("vit_host",), (4,), (1,), ("fp32", "amp"), (*_STEP, "fused_block", "fused_block_joint"), (), 30
)

CPU_GRIDS = {
    "host": _HOST,
    "six_projections": Grid(_SMALL_BASE, _RANKS, (8,), ("fp32",), _SIX, (), 120),
    "plan_choice": Grid(_SMALL_BASE, _RANKS, (1, 8), ("fp32",), (), (), 240),
    "saved_bytes": _COUNTED,
    "sharing": Grid(_SMALL_BASE, (16,), (2,), ("fp32",), (), (), 60),
    "train_step": Grid(
        *(_SMALL_BASE, (16, 256), (2, 8), ("fp32",), (*_STEP, *_BLOCK), _SMALL_BASE[1:], 60),
        one_rank=((_SMALL_BASE[0], 2), (_SMALL_BASE[1], 1)),  # eight images show what a rank costs
    ),
    "wecolora_step": Grid(
        _SMALL_BASE[1:], (128,), (8,), ("fp32",), ("frozen", "naive", "peft", "fused"), (), 120
    ),
}
CUDA_GRIDS = {
    "host": _HOST,
    "saved_bytes": _COUNTED,
    "sharing": Grid(_SMALL_BASE, (16, 128), (32,), ("bf16", "fp32"), (), (), 120),
    "plan_choice": Grid(_SMALL_BASE, _RANKS, (8, 128), ("bf16",), (), (), 240),
    "six_projections": Grid(
        (*_SMALL_BASE, "vit_large_patch16_224"),
        (16, 64, 256, 512),
        (32, 100, 128, 256),  # M = 6304, 19700, 25216, 50432
        ("bf16",),
        (*_SIX[:4], "peft_bf16", *_SIX[4:]),
        (),
        240,
    ),
    "train_step": Grid(
        (*_SMALL_BASE, "vit_large_patch16_224"),
        (16, 64, 128, 256, 512),
        (32, 128),
        ("amp", "fp32"),
        (*_STEP[:3], "peft_bf16", "addmm", *_STEP[3:], *_BLOCK),
        (),
        600,
    ),
    "wecolora_step": Grid(
        _SMALL_BASE[1:],
        (128, 256, 512),
        (8, 128),
        ("amp", "fp32"),
        ("frozen", "naive", "peft", "peft_bf16", "fused"),
        (),
        240,
    ),
}


def grid(suite: str, device: str) -> Grid:
    """The default grid of ``suite`` on ``device``."""
    return (CUDA_GRIDS if device.startswith("cuda") else CPU_GRIDS)[suite]
