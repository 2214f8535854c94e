"""Every kernel within the yardstick, every output written, nothing written beside it."""

import pytest
import torch

from tests.kernels.triton.cases import CASES, DTYPES, IDS, build
from tests.kernels.triton.guards import fenced
from tests.kernels.triton.parity import check, one_pass_run, triton_run

DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
CASE = pytest.mark.parametrize("case", CASES, ids=IDS)


@CASE
@DTYPE
def test_parity_with_fp32_adapters(case, dtype, monkeypatch):
    with fenced(monkeypatch):
        check(build(case, dtype, torch.float32), dtype)


@CASE
def test_parity_with_bf16_adapters(case, monkeypatch):
    with fenced(monkeypatch):
        check(build(case, torch.bfloat16, torch.bfloat16, seed=1), torch.bfloat16)


@DTYPE
@pytest.mark.parametrize("run", [triton_run, one_pass_run])
def test_same_inputs_same_bits(run, dtype):
    p = build(CASES[3], dtype, torch.float32)
    once, again = dict(run(p)), dict(run(p))
    assert len(once) >= 4
    for name in once:
        assert torch.equal(once[name], again[name]), name
