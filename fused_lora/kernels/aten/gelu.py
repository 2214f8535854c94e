"""GELU and its slope by the library, with the face of the Triton kernel's: erf or tanh.

torch 2.15's erf form on CPUs leaves a strided ``out`` unwritten in fp32 and bf16, without a word;
there the result is copied, which also takes half the time of the kernel that would write it.
"""

from __future__ import annotations

import torch
from torch import Tensor

APPROXIMATE = {"erf": "none", "tanh": "tanh"}


def gelu_places(u: Tensor, kind: str = "erf") -> bool:
    """Whether ``out`` costs nothing beside a new tensor."""
    return not u.is_cpu or kind == "tanh"


def gelu_forward(u: Tensor, kind: str = "erf", out: Tensor | None = None) -> Tensor:
    """GELU(u) [M, N]; ``out`` may be the left of a bordered buffer. Rows are contiguous."""
    approximate = APPROXIMATE[kind]
    if out is None:
        return torch.ops.aten.gelu(u, approximate=approximate)
    if not gelu_places(u, kind):
        return out.copy_(torch.ops.aten.gelu(u, approximate=approximate))
    return torch.ops.aten.gelu(u, approximate=approximate, out=out)


def gelu_input_grad(dy: Tensor, u: Tensor, kind: str = "erf", out: Tensor | None = None) -> Tensor:
    """du = GELU'(u) dy [M, N], likewise."""
    approximate = APPROXIMATE[kind]
    if out is None:
        return torch.ops.aten.gelu_backward(dy, u, approximate=approximate)
    return torch.ops.aten.gelu_backward(dy, u, approximate=approximate, grad_input=out)
