"""Convolutions in PEFT's files: two convolutions for an adapter, where a kernel's is two matrices.

ours    <conv>.kernel   a [R, C k]                b [N, R]
PEFT's  <conv>          lora_A [R, C, window]     lora_B [N, R, 1, ...]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from fused_lora.io.keys import a_key, b_key
from fused_lora.io.peft import Settings
from fused_lora.nn.child_adapters import FusedLoRAConvWeight

Numbers = dict[str, float]


def to_peft(
    modules: Mapping[str, nn.Module],
    tensors: dict[str, Tensor],
    ranks: dict[str, int],
    scales: Numbers,
) -> tuple[dict[str, Tensor], dict[str, int], Numbers]:
    """A file's tensors, and ranks and scales by module, under PEFT's names and in its shapes."""
    tensors, ranks, scales = dict(tensors), dict(ranks), dict(scales)
    for ours, theirs, shape in _kernels(modules):
        a, b = tensors.pop(a_key(ours)), tensors.pop(b_key(ours))
        tensors[a_key(theirs)] = a.view(-1, *shape[1:])
        tensors[b_key(theirs)] = b.view(*b.shape, *(1 for _ in shape[2:]))
        ranks[theirs], scales[theirs] = ranks.pop(ours), scales.pop(ours)
    return tensors, ranks, scales


def from_peft(
    modules: Mapping[str, nn.Module], adapters: dict[str, Tensor], settings: Settings
) -> tuple[dict[str, Tensor], Settings]:
    """The tensors under our names, and settings that know these; what fits not stays as it is."""
    adapters, found = dict(adapters), {}
    for ours, theirs, shape in _kernels(modules):
        a, b = adapters.pop(a_key(theirs), None), adapters.pop(b_key(theirs), None)
        if a is not None:
            adapters[a_key(ours)] = a.flatten(1) if a.shape[1:] == shape[1:] else a
        if b is not None:
            adapters[b_key(ours)] = b.flatten(1) if b[0, 0].numel() == 1 else b
        found[ours] = settings.rank_of(theirs), settings.scale_of(theirs)
    return adapters, settings.with_modules(found)


def _kernels(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Our name, PEFT's, and the kernel's shape, of each adapted convolution."""
    for name, module in modules.items():
        if isinstance(module, FusedLoRAConvWeight):
            yield name, name.rpartition(".")[0], tuple(module._whole().shape)
