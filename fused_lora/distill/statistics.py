"""BatchNorm under adapters: its statistics belong to the frozen weights, and stay.

    y = (x - mean) / sqrt(var + eps) gamma + beta      mean, var of the teacher, in any mode

A few images are no substitute for the set that the teacher's mean and variance come from, and
adapters merge into the convolutions alone: what the norms do must be the same before and after.
"""

from __future__ import annotations

from typing import Any

from torch import nn

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def hold_statistics(model: nn.Module) -> list[str]:
    """Make every BatchNorm compute with its running statistics and keep them, in training too.

    Returns:
        The dotted names of the norms; ``release_statistics`` is the way back.
    """
    held = []
    for name, module in model.named_modules():
        if isinstance(module, NORMS) and module.running_mean is not None:
            _release(module)
            module.register_forward_pre_hook(_in_eval)
            held.append(name)
    return held


def release_statistics(model: nn.Module) -> None:
    """Ordinary norms again, which follow the mode that the model is put in."""
    for module in model.modules():
        if isinstance(module, NORMS):
            _release(module)


def _in_eval(norm: nn.Module, inputs: Any) -> None:
    norm.training = False


def _release(norm: nn.Module) -> None:
    mine = [key for key, hook in norm._forward_pre_hooks.items() if hook is _in_eval]
    for key in mine:
        del norm._forward_pre_hooks[key]
