"""Whether this is a moment to run kernels of one's own: not in a capture, not in a trace."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_lora.programs.record import recording

_MODES = torch._C._TorchDispatchModeKey


def why_not_now(device: torch.device) -> str | None:
    """One sentence why nothing can be checked on ``device`` now; None when it can."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured"
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or _recorded():
        return "a program is being traced"
    return None


def untouchable(t: Tensor) -> str | None:
    """One sentence why a kernel cannot read ``t`` by its address; None when it can."""
    if recording():  # its launches are written down
        return None
    if type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"{type(t).__name__} holds no memory that a kernel could read"
    if torch.jit.is_tracing() or _recorded():
        return "a program is being traced, and a launch would leave no trace in it"
    return None


def _recorded() -> bool:
    """Whether operations are recorded, or run without data."""
    if recording():
        return False
    modes = (_MODES.PROXY, _MODES.FAKE, _MODES.FUNCTIONAL)
    return any(torch._C._get_dispatch_mode(mode) is not None for mode in modes)
