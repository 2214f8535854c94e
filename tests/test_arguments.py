"""Whatever an option is given that it does not take: an error that names it, in one line."""

from __future__ import annotations

import inspect
import math
import traceback
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

import fused_lora
from fused_lora.arguments import all_finite, brief
from fused_lora.distill import copy_layers
from fused_lora.nn import AdapterConfig, FusedLoRAGroupedLinear, FusedLoRALinear
from fused_lora.ops.lora_linear_plain import DTYPES
from tests.patching.models import build

VALUES = {
    "tensor": torch.randn(2, 3, 32, 32),
    "number in a tensor": torch.tensor(3.5),
    "module": nn.Linear(3, 3),
    "list": list(range(2000)),
    "dict": {i: i for i in range(1000)},
    "nan": math.nan,
    "-1": -1,
    "0": 0,
    "1.5": 1.5,
    "word": "no such",
    "long word": "x" * 3000,
    "empty": "",
    "None": None,
    "function": lambda: 0,
    "bytes": b"x" * 2000,
    "True": True,
    "tuple": (1, "a"),
    "tensors": [torch.ones(9, 9)],
    "dtype": torch.int8,
    "object": object(),
}
NUMBERS = {"-1", "0", "1.5", "None"}
FLAG = {"True"}
ANY = {*VALUES}
TORCH = {"in_features", "out_features", "bias", "device", "dtype"}  # nn.Linear's own

TAKES = {  # of each option what it takes; an option that is not here takes none of VALUES
    "patch": {
        **dict(targets={"None"}, qkv={"None"}, rank={"None"}, rank_pattern={"None"}),
        **dict(alpha_pattern={"None"}, trainable={"empty", "None"}, layers={"0", "None"}),
        **dict(memory_budget_gb={"1.5", "None"}, recompute={"None"}, seed={"-1", "0", "None"}),
        **dict(allow_large_rank=FLAG, keep_forward=FLAG, example_input=ANY, options=ANY),
    },
    "explain": {"device": {"None", "0"}, "dtype": {"None"}},
    "explain_program": {"measure": FLAG},
    "merge": {"seed": {"-1", "0"}},
    "unpatch": {"merge": FLAG},
    "prepare": {"processes": {"None"}, "tell": {"None", "function", "module"}},
    "save": {"trainable": FLAG, "fold_mid": FLAG, "folder": {"word", "long word"}},
    "load": {"allow_rounding": FLAG, "leave_out": {"empty", "None"}},
    "load_lora_state_dict": {"allow_rounding": FLAG},
    "copy_layers": {"share": FLAG, "own": {"empty"}},
    "share_adapters": {
        **dict(rank={"None"}, trainable={"empty"}, example_input=ANY, mapping={"function"}),
    },
    "adopt_additive": {"spans": {"None"}, "linear": {"module"}, "options": ANY},
    "AdapterConfig": {
        **dict(alpha=NUMBERS, scale=NUMBERS, rank_stabilized=FLAG, dropout={"0"}, dora=FLAG),
        **dict(mid={"None"}, base_dtype={"None"}),
    },
    "FusedLoRALinear": {"options": ANY},
    "FusedLoRAGroupedLinear": {"options": ANY},
}
NEEDED = {  # what a call must be given beside the option and its models
    "copy_layers": {"reduction": 2},
    "adopt_additive": {"linear": nn.Linear(8, 8)},
    "explain_program": {"name": "blocks.0.mlp"},
    "prepare": {"example": torch.ones(1, 3, 32, 32)},
    "save": {"folder": "never"},
    "load_lora_state_dict": {"state": {}},
    "FusedLoRALinear": {"in_features": 8, "out_features": 8},
    "FusedLoRAGroupedLinear": {"in_features": 8, "out_features": 8, "spans": {"q": (0, 4)}},
}
OF_PATCHED = (
    *("explain", "explain_program", "merge", "unmerge", "unpatch", "disable", "prepare", "save"),
    *("load", "lora_state_dict", "load_lora_state_dict", "enable_input_grads"),
)
MODELS = {name: {"model": "patched"} for name in OF_PATCHED} | {  # by option: which model
    "patch": {"model": "plain"},
    "copy_layers": {"teacher": "plain"},
    "share_adapters": {"teacher": "patched", "student": "plain"},
    "unshare_adapters": {"student": "plain"},
}
OTHERS = (AdapterConfig, FusedLoRALinear, FusedLoRAGroupedLinear, fused_lora.adopt_additive)
CALLS = {name: getattr(fused_lora, name, copy_layers) for name in MODELS}
CALLS |= {each.__name__: each for each in OTHERS}
OPTIONS = [
    (name, option)
    for name, call in CALLS.items()
    for option in inspect.signature(call).parameters
    if option not in TORCH or name in OF_PATCHED
    if option not in ("example", "generator")  # whatever the model takes; torch names it
]


@pytest.fixture(scope="module")
def models():
    plain, patched = build(), build()
    fused_lora.patch(patched, rank=4)
    return {"plain": plain, "patched": patched}


@pytest.fixture(scope="module")
def saved(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    fused_lora.save(models["patched"], folder)
    return folder


def state(model):
    kinds = [type(module) for module in model.modules()]
    return [(n, p.shape, p.requires_grad) for n, p in model.named_parameters()], kinds


@pytest.mark.parametrize("name, option", OPTIONS)
def test_a_wrong_value_is_refused_by_name(name, option, models, saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    takes = TAKES.get(name, {}).get(option, set())
    for label, value in VALUES.items():
        if label in takes:
            continue
        given = dict(NEEDED.get(name, {})) | ({"folder": saved} if name == "load" else {})
        mine = MODELS.get(name, {})
        given |= {each: models[which] for each, which in mine.items()}
        before = [state(model) for model in models.values()]
        with pytest.raises((ValueError, TypeError)) as caught:
            made = CALLS[name](**given | {option: value})
            getattr(made, "__enter__", lambda: None)()  # of ``disable``
        if option in mine and label == "module":
            continue  # a module, but none that can be served: the error says what it is
        text, where = str(caught.value), traceback.extract_tb(caught.value.__traceback__)[-1]
        assert option in text and len(text) < 400 and "\n" not in text, (label, text)
        assert "fused_lora" in where.filename, (label, text, where)
        assert [state(model) for model in models.values()] == before, label
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "call, given, meant",
    [
        (fused_lora.patch, {"lora_alpha": 4}, "patch has no option 'lora_alpha'; did you mean 'al"),
        (fused_lora.patch, {"ranks": 4}, "'ranks'; did you mean 'rank'"),
        (fused_lora.patch, {"target_modules": ["q"]}, "did you mean 'targets'"),
        (fused_lora.patch, {"zebra": 1}, "no option 'zebra'; its options are model, rank, targets"),
        (FusedLoRALinear, {"r": 4}, "FusedLoRALinear has no option 'r'; did you mean 'rank'"),
    ],
)
def test_an_unknown_option_is_told_what_was_meant(call, given, meant):
    needed = (8, 8) if call is FusedLoRALinear else (build(),)
    with pytest.raises(TypeError) as caught:
        call(*needed, **given)
    assert meant in str(caught.value)


@pytest.mark.parametrize(
    "value, text",
    [
        (torch.ones(2, 3), "a tensor [2, 3] of torch.float32"),
        ([nn.Linear(1, 1)], "a list of 1"),
        ({"a": torch.ones(1)}, "a dict of 1"),
        (nn.Linear(1, 1), "a module Linear"),
        (list(range(9)), "[0, 1, 2, 3, 4, 5, ...]"),
        (1.5, "1.5"),
        ("no such", "'no such'"),
        (None, "None"),
    ],
    ids=str,
)
def test_what_an_error_shows(value, text):
    assert brief(value) == text


def test_numbers_of_numpy_are_numbers():
    config = AdapterConfig(alpha=np.float32(8), dropout=np.float64(0.5))
    assert config.scale_for(4) == 2.0
    FusedLoRALinear(8, 8, rank=4).set_scale(np.float16(0.5))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("shape", [(0, 7), (1,), (3, 5, 67), (129, 130)], ids=str)
def test_what_is_not_finite_is_seen_wherever_it_is(shape, dtype):
    tensor = torch.ones(shape).to(dtype)
    assert all_finite(tensor) and all_finite(tensor.t() if tensor.dim() == 2 else tensor)
    if not dtype.is_floating_point or not tensor.numel():
        return
    flawed = [math.nan] + [math.inf, -math.inf] * (dtype in DTYPES)
    for bad, at in product(flawed, {0, tensor.numel() // 2, tensor.numel() - 1}):
        wrong = torch.ones(shape)
        wrong.view(-1)[at] = bad
        assert not all_finite(wrong.to(dtype)), (bad, at)
    largest = torch.full(shape, torch.finfo(dtype).max, dtype=dtype)  # no sum of which is finite
    assert all_finite(largest) and all_finite(nn.Parameter(largest))
