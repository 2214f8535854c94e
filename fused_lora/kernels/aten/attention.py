"""Attention by the library's fused kernels, forward and backward apart: nothing is run twice.

    out = softmax(q kT / sqrt(D)) v per head;  backward reads q, k, v, out and the log-sum-exp

                q, k, v, out, d_out [B, H, T, D]    log-sum-exp [B, H, T], fp32, padded by some

Which kernel serves is torch's own choice, as in ``scaled_dot_product_attention``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

aten = torch.ops.aten
Key = tuple[str, int]  # device type, the value of an SDPBackend
Three = tuple[Tensor, Tensor, Tensor]

NO_DROPOUT, NOT_CAUSAL = 0.0, False
CUDA_DEPTH = 128  # D up to which every fused backward on CUDA serves; beyond, some chips refuse


class Attended(NamedTuple):
    """What one forward hands back, and its backward takes."""

    out: Tensor  # [B, H, T, D]
    kept: tuple[Tensor | None, ...]  # beside q, k and v
    numbers: tuple[int, ...] = ()  # likewise


def serves(q: Tensor, k: Tensor, v: Tensor) -> Key | None:
    """The fused kernel that torch would take for these; None where it is not known here."""
    depth = q.shape[-1]
    if q.is_cuda and (depth % 8 or depth > CUDA_DEPTH):  # torch would pad q, k and v
        return None
    key = (q.device.type, torch._fused_sdp_choice(q, k, v))
    return key if key in KERNELS else None


def forward(key: Key, qkv: Three) -> Attended:
    """One pass by the kernel of ``key``."""
    return KERNELS[key][0](*qkv)


def backward(key: Key, d_out: Tensor, qkv: Three, done: Attended) -> Three:
    """dq, dk and dv."""
    return KERNELS[key][1](d_out, qkv, done)


def _cpu(q: Tensor, k: Tensor, v: Tensor) -> Attended:
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return Attended(out, (out, lse))


def _cpu_backward(d_out: Tensor, qkv: Three, done: Attended) -> Three:
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        d_out, *qkv, *done.kept, NO_DROPOUT, NOT_CAUSAL
    )


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Attended:
    out, lse, starts_q, starts_k, most_q, most_k, seed, offset, _ = (
        aten._scaled_dot_product_flash_attention(q, k, v)
    )
    return Attended(out, (out, lse, starts_q, starts_k, seed, offset), (most_q, most_k))


def _flash_backward(d_out: Tensor, qkv: Three, done: Attended) -> Three:
    *before, seed, offset = done.kept
    return aten._scaled_dot_product_flash_attention_backward(
        d_out, *qkv, *before, *done.numbers, NO_DROPOUT, NOT_CAUSAL, seed, offset
    )


def _efficient(q: Tensor, k: Tensor, v: Tensor) -> Attended:
    out, *rest = aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
    return Attended(out, (out, *rest))


def _efficient_backward(d_out: Tensor, qkv: Three, done: Attended) -> Three:
    asked = [True, True, True, False]  # none of the bias, which is absent
    *found, _ = aten._scaled_dot_product_efficient_attention_backward(
        d_out, *qkv, None, *done.kept, NO_DROPOUT, asked, NOT_CAUSAL
    )
    return tuple(found)


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Attended:
    out, lse, starts_q, starts_k, most_q, most_k, seed, offset, _ = (
        aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
    )
    return Attended(out, (out, lse, seed, offset, starts_q, starts_k), (most_q, most_k))


def _cudnn_backward(d_out: Tensor, qkv: Three, done: Attended) -> Three:
    *before, starts_q, starts_k = done.kept
    return aten._scaled_dot_product_cudnn_attention_backward(
        d_out, *qkv, *before, None, starts_q, starts_k, *done.numbers, NO_DROPOUT, NOT_CAUSAL
    )


Forward = Callable[[Tensor, Tensor, Tensor], Attended]
Backward = Callable[[Tensor, Three, Attended], Three]
KERNELS: dict[Key, tuple[Forward, Backward]] = {
    ("cpu", SDPBackend.FLASH_ATTENTION.value): (_cpu, _cpu_backward),
    ("cuda", SDPBackend.FLASH_ATTENTION.value): (_flash, _flash_backward),
    ("cuda", SDPBackend.EFFICIENT_ATTENTION.value): (_efficient, _efficient_backward),
    ("cuda", SDPBackend.CUDNN_ATTENTION.value): (_cudnn, _cudnn_backward),
}
