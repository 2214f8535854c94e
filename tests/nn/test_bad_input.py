"""Every wrong option of a module is named, with the value seen."""

import pytest
import torch
from torch import nn

from fused_lora import FusedLoRAGroupedLinear, FusedLoRALinear


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"rank must be a whole number from 1 on, got 0"),
        ({"rank": -3}, "got -3"),
        ({"rank": 2.0}, "got 2.0"),
        ({"rank": True}, "got True"),
        ({"alpha": 1, "scale": 2}, "alpha or scale, not both: got 1 and 2"),
        ({"scale": float("nan")}, "scale must be finite, got nan"),
        ({"alpha": float("inf")}, "alpha must be finite, got inf"),
        ({"rank_stabilized": True}, "give alpha"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, "got -0.1"),
        ({"init": "zeros"}, r"init must be one of .*kaiming.*, got .zeros."),
        ({"adapter_dtype": torch.int8}, "floating dtype, got torch.int8"),
        ({"impl": "magic"}, "impl must be one of .* got 'magic'"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        FusedLoRALinear(12, 24, **options)


def test_unknown_option():
    with pytest.raises(TypeError, match="ranks"):
        FusedLoRALinear(12, 24, ranks=3)


@pytest.mark.parametrize(
    ("spans", "rank", "message"),
    [
        ({}, 4, "names no group"),
        ({"q": (0, 25)}, 4, r"'q' = \(0, 25\) is empty, overlaps another, or leaves the 24"),
        ({"q": (0, 8), "k": (7, 16)}, 4, r"'k' = \(7, 16\)"),
        ({"q": (4, 4)}, 4, "is empty"),
        ({"q.k": (0, 8)}, 4, "'q.k' is no identifier"),
        ({"q": (0, 8)}, {"v": 4}, r"ranks are given for \['v'\], spans for \['q'\]"),
        ({"q": (0, 3)}, 0, r"FusedLoRAGroupedLinear q: rank must be .* got 0"),
    ],
)
def test_groups(spans, rank, message):
    with pytest.raises(ValueError, match=message):
        FusedLoRAGroupedLinear(12, 24, spans=spans, rank=rank)


def test_adopting_what_is_no_plain_linear():
    class Quantised(nn.Linear):
        pass

    with pytest.raises(TypeError, match=r"Quantised, not a plain\s+torch.nn.Linear"):
        FusedLoRALinear.adopt(Quantised(12, 24), rank=4)
    with pytest.raises(TypeError, match="Conv2d, not a plain"):
        FusedLoRALinear.adopt(nn.Conv2d(3, 3, 1), rank=4)
    with pytest.raises(TypeError, match="already carries adapters"):
        FusedLoRALinear.adopt(FusedLoRALinear(12, 24, rank=4), rank=4)


def test_groups_and_scales_by_name():
    module = FusedLoRALinear(12, 24, rank=4)
    with pytest.raises(ValueError, match="no adapter named 'q'"):
        module.adapter("q")
    with pytest.raises(ValueError, match="no adapter named 'q'"):
        module.set_scale(1.0, "q")
    with pytest.raises(ValueError, match="scale must be finite, got inf"):
        module.set_scale(float("inf"))


def test_merge_options():
    module = FusedLoRALinear(12, 24, rank=4)
    with pytest.raises(ValueError, match="rounding must be one of .* got 'up'"):
        module.merge("up")
    with pytest.raises(ValueError, match="not torch.float32"):
        module.merge("stochastic")
    with pytest.raises(ValueError, match="impl must be one of .* got 'magic'"):
        module.merge(impl="magic")
    assert not module.merged


@pytest.mark.parametrize("reset", ["reset_adapters", "reset_parameters"])
def test_reset_while_merged(reset):
    module = FusedLoRALinear(12, 24, rank=4)
    module.merge()
    with pytest.raises(RuntimeError, match=f"{reset}: the adapters are merged"):
        getattr(module, reset)()


def test_release_of_a_parametrized_adapter():
    module = FusedLoRALinear(12, 24, rank=4)
    torch.nn.utils.parametrize.register_parametrization(module, "lora_A", nn.Identity())
    with pytest.raises(RuntimeError, match=r"release: \['lora_A'\] are parametrized"):
        module.release()
    module(torch.randn(5, 12)).sum().backward()
