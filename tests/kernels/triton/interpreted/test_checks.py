"""The check of first use on the kernels themselves, and on one that is broken."""

import pytest
import torch

from fused_lora.kernels.triton import lora_expand, lora_extended, lora_merge, lora_one_pass
from fused_lora.kernels.triton.launches import Launch
from fused_lora.kernels.triton.tiles import (
    ELEMENTS,
    EXTENDED_GRADS,
    FP8,
    PACK,
    PACK_GRADS,
    SAFE,
    BulkTile,
    GradTile,
    MergeTile,
    ThinTile,
    expand_tile,
    gelu_grads_candidates,
    row_shrink_tile,
    row_tile,
)
from fused_lora.ops.lora_linear import lora_linear
from fused_lora.testing.yardstick import in_every_order, judge
from fused_lora.types import Span
from fused_lora.verify import check, verdicts
from fused_lora.verify.check import Shape
from fused_lora.verify.kernel_registry import of_launch
from tests.kernels.triton.cases import CASES, build, lowered
from tests.kernels.triton.interpreted.serving import serving  # noqa: F401

CPU = torch.device("cpu")
LAUNCHES = [
    Launch("extended", SAFE),
    Launch("extended", BulkTile(128, 128, 64, 3, 8, rest_n=64)),
    Launch("one_pass", SAFE),
    Launch("shrink", ThinTile(64, 16, 64, 4, 4)),
    Launch("grad", GradTile(16, 128, 64, 4, 4)),
    Launch("merge", MergeTile()),
    *(Launch(f"extended_{epilogue}", SAFE) for epilogue in ("gelu", "scale", "dropout")),
    *(Launch("extended_grads", tile) for tile in EXTENDED_GRADS),
    Launch("extended_grads_tanh", SAFE),
    *(Launch("gelu_grads", tile) for arch in (80, 90) for tile in gelu_grads_candidates(512, arch)),
    Launch("gelu_grads_tanh", gelu_grads_candidates(512, 80)[0]),
    *(Launch("pack_grads", tile) for tile in PACK_GRADS),
    Launch("extended_scale", BulkTile(128, 128, 64, 3, 8, rest_n=64)),
    Launch("one_pass_scale", SAFE),
    Launch("one_pass_wide", SAFE),
    Launch("shrink_dropout", ThinTile(64, 16, 64, 4, 8)),
    *(Launch("shrink_norm", row_shrink_tile(rank, True)) for rank in (16, 48)),
    *(Launch("shrink_gelu", row_shrink_tile(rank, False)) for rank in (16, 48)),
    *(Launch("expand_norm", expand_tile(rank)) for rank in (16, 48)),
    *(Launch("expand_residual", expand_tile(rank)) for rank in (16, 48)),
    Launch("grad_dropout", GradTile(16, 128, 64, 4, 8)),
    Launch("border_weight", PACK),
    Launch("merge_many", MergeTile()),
    Launch("layer_norm", row_tile(200)),
    Launch("gelu", ELEMENTS),
    Launch("quantise", row_tile(200)),
    Launch("extended_fp8", FP8[2]),
]


@pytest.fixture
def checking(serving):  # noqa: F811
    """First use is checked, on fewer elements than on a GPU."""
    small = Shape(
        64, 64, 96, tuple(Span(32 * g, 32 * g + 32, 16) for g in range(3)), False, True, 0
    )
    for name in ("SHAPES", "ALIGNED"):  # an interpreter is slow
        serving.setattr(check, name, (getattr(check, name)[0], small))
    serving.setenv("FUSED_LORA_VERIFY", "first")
    return serving


@pytest.mark.parametrize(
    "launch", LAUNCHES, ids=lambda launch: launch.kernel + " bulk" * launch.bulk
)
def test_the_kernels_pass(checking, launch):
    found = verdicts.verdict(of_launch(launch, "bfloat16"), CPU)
    assert found.passed, str(found)


def corrupt(monkeypatch, module):
    """The GEMM of ``module`` leaves the last element of y as it found it."""
    right = module.forward

    def broken(*args, **options):
        found = right(*args, **options)
        found.y[-1, -1] = 0.0
        return found

    monkeypatch.setattr(module, "forward", broken)


TERM_FAULTS = {  # of h or dh, and of adapters, that a term is formed of
    "none": lambda h, group: (h, group),
    "no term": lambda h, group: (0 * h, group),
    "other rows": lambda h, group: (h.roll(1, 0), group),
    "a rank less": lambda h, group: (torch.cat((h[:, :-1], 0 * h[:, -1:]), 1), group),
    "no scale": lambda h, group: (h, group._replace(scales=[1.0] * len(group.scales))),
}


@pytest.mark.parametrize("fault", TERM_FAULTS)
@pytest.mark.parametrize("kernel", ["expand_norm", "expand_residual"])
def test_a_wrong_term_is_caught(checking, kernel, fault):
    name = "layer_norm_expand" if kernel == "expand_norm" else "residual_expand"
    at = 5 if kernel == "expand_norm" else 1
    right = getattr(lora_expand, name)

    def wrong(*args, **options):
        return right(
            *args[:at], *TERM_FAULTS[fault](*args[at : at + 2]), *args[at + 2 :], **options
        )

    checking.setattr(lora_expand, name, wrong)
    found = of_launch(Launch(kernel, expand_tile(16)), "bfloat16").check(CPU)
    harmless = fault == "none" or (fault == "no scale" and kernel == "expand_norm")  # dh carries it
    assert found.passed == harmless, str(found)


def last_bits(t):
    return torch.nextafter(t, torch.full_like(t, torch.inf))


BORDER_FAULTS = {  # of w and adapters that are laid side by side
    "none": lambda w, group: (w, group),
    "last bits of w": lambda w, group: (last_bits(w), group),
    "a rank less": lambda w, group: (w, group._replace(b=[b * (b != b[:, -1:]) for b in group.b])),
    "no scale": lambda w, group: (w, group._replace(scales=[1.0] * len(group.scales))),
    "rounded before": lambda w, group: (w, group.to(torch.float8_e5m2).to(w.dtype)),
}


@pytest.mark.parametrize("fault", BORDER_FAULTS)
def test_a_wrong_border_is_caught(checking, fault):
    right = lora_merge.bordered_weight
    wrong = lambda w, group, **how: right(*BORDER_FAULTS[fault](w, group), **how)  # noqa: E731
    checking.setattr(lora_merge, "bordered_weight", wrong)
    found = of_launch(Launch("border_weight", PACK), "bfloat16").check(CPU)
    assert found.passed == (fault == "none"), str(found)


def test_a_broken_kernel_is_caught_and_another_serves(checking):
    checking.setattr("fused_lora.plan.cost_kernels.TRITON_EFFICIENCY", 1e6)  # auto would take it
    checking.setattr("fused_lora.plan.cost_kernels.TRITON_LAUNCH_CALLS", 0.0)
    for module in (lora_extended, lora_one_pass):
        corrupt(checking, module)
    p = build(CASES[3], torch.bfloat16, torch.float32)
    call = lambda q, impl: lora_linear(q.x, q.w, q.bias, q.a, q.b, q.scales, q.spans, impl=impl)  # noqa: E731
    with pytest.warns(RuntimeWarning, match=r"does not use triton \w+ .*error .* over the budget"):
        ours = call(p, "auto")
    low = lowered(p, torch.bfloat16)
    plain = in_every_order(lambda: call(low, "reference"))
    verdict = judge("y", ours, plain, call(p.double(), "reference"), p.x.dtype)
    assert verdict.passed, str(verdict)
