"""Saved bytes on cases small enough to count by hand."""

from __future__ import annotations

import torch
from torch import nn

from fused_lora.bench.methods import NaiveLinear
from fused_lora.bench.saved_tensors import SavedBytes, WideCopies

M, K, N, R = 6, 8, 4, 2
FLOAT = 4  # bytes


def kept(module: nn.Module, x: torch.Tensor, *excluded: torch.Tensor) -> int:
    with SavedBytes(module, excluded) as saved:
        y = module(x)
    del y
    return saved.total


def test_a_linear_saves_x_and_not_its_weight() -> None:
    assert kept(nn.Linear(K, N), torch.randn(M, K)) == FLOAT * M * K


def test_the_input_can_be_left_out() -> None:
    x = torch.randn(M, K)
    assert kept(nn.Linear(K, N), x, x) == 0


def test_a_frozen_linear_saves_nothing() -> None:
    frozen = nn.Linear(K, N).requires_grad_(False)
    assert kept(frozen, torch.randn(M, K, requires_grad=True)) == 0


def test_naive_lora_saves_x_once_and_h() -> None:
    naive = NaiveLinear(nn.Linear(K, N).requires_grad_(False), R)
    assert kept(naive, torch.randn(M, K, requires_grad=True)) == FLOAT * (M * K + M * R)


def test_views_of_one_storage_count_once() -> None:
    class Square(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:2] * x[2:4] + x[4:] * x.t()[:, :2].t()

    x = torch.randn(M, K, requires_grad=True)
    assert kept(Square(), x) == FLOAT * M * K


def test_each_block_owns_what_it_saves_first() -> None:
    model = nn.Sequential(nn.Linear(K, K), nn.Linear(K, N))
    with SavedBytes(model, sections=model) as saved:
        y = model(torch.randn(M, K))
        y = y * y
    assert saved.by_section == {
        "0": FLOAT * M * K,
        "1": FLOAT * M * K,
        "outside": FLOAT * M * N,
    }


def test_wide_copies_counts_activations_only() -> None:
    x, small = torch.randn(M, K).bfloat16(), torch.randn(R, K).bfloat16()
    with WideCopies(min_elements=M * K) as wide:
        x.float(), small.float(), x.float().bfloat16()
    assert (wide.count, wide.nbytes) == (2, 2 * FLOAT * M * K)
