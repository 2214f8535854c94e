"""torch's MultiheadAttention in PEFT's files: one adapter on the whole module.

    ours   <mha>.in_proj, <mha>.out_proj                       each with a rank and a scale
    PEFT's <mha> (q, k and v), <mha>.base_layer.out_proj       both of one rank R and one scale s

The smaller rank is filled up with zeros, which compute nothing and are taken off again on load.
Source: PEFT 0.21, ``peft.tuners.lora.layer.MultiheadAttention``, which adds s b a of out_proj twice
(its pull request 3774); a file means w + s b a.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from fused_lora.io.keys import AdapterFileError, a_key, b_key
from fused_lora.io.peft import Settings
from fused_lora.nn import AdaptedLinear

PARTS = {"in_proj": "{}", "out_proj": "{}.base_layer.out_proj"}  # ours, and PEFT's of its module

Numbers = dict[str, float]


def to_peft(
    modules: Mapping[str, nn.Module],
    tensors: dict[str, Tensor],
    ranks: dict[str, int],
    scales: Numbers,
) -> tuple[dict[str, Tensor], dict[str, int], Numbers]:
    """A file's tensors, and ranks and scales by module, under PEFT's names.

    Raises:
        AdapterFileError: the two projections of an attention have different scales.
    """
    tensors, ranks, scales = dict(tensors), dict(ranks), dict(scales)
    for name, parts in _attentions(modules, ranks):
        rank = max(ranks[part] for part in parts.values())
        found = {scales[part] for part in parts.values()}
        if len(found) > 1:
            raise AdapterFileError(
                f"{name}: PEFT has one scale for both projections of a MultiheadAttention, got "
                f"{ {part: scales[part] for part in parts.values()} }: patch them with one"
            )
        for part, ours in parts.items():
            a, b = tensors.pop(a_key(ours)), tensors.pop(b_key(ours))
            theirs = PARTS[part].format(name)
            tensors[a_key(theirs)] = _filled(a, rank, 0)
            tensors[b_key(theirs)] = _filled(b, rank, 1)
            del ranks[ours], scales[ours]
        (scale,) = found
        ranks[name], scales[name] = rank, scale
    return tensors, ranks, scales


def from_peft(
    modules: Mapping[str, nn.Module],
    adapters: dict[str, Tensor],
    settings: Settings,
    where: str,
) -> tuple[dict[str, Tensor], Settings]:
    """The tensors under our names, and settings that know these.

    Raises:
        AdapterFileError: an adapter on a projection that the model adapts not, or a half of one.
    """
    adapters, found = dict(adapters), {}
    for name, parts in _attentions(modules, modules):
        scale = settings.scale_of(name)
        for part, theirs in PARTS.items():
            a = adapters.pop(a_key(theirs.format(name)), None)
            b = adapters.pop(b_key(theirs.format(name)), None)
            if a is None and b is None:
                continue
            if a is None or b is None:
                raise AdapterFileError(f"{where}: {theirs.format(name)} has but one of a and b")
            if part not in parts:
                if torch.count_nonzero(b):
                    raise AdapterFileError(f"{where}: the model has no adapter at {name}.{part}")
                continue
            module = modules[parts[part]]
            assert isinstance(module, AdaptedLinear)
            a, b = _cut(a, b, sum(span.rank for span in module.groups.values()))
            adapters[a_key(parts[part])], adapters[b_key(parts[part])] = a, b
            found[parts[part]] = len(a), scale
    return adapters, settings.with_modules(found)


def _attentions(
    modules: Mapping[str, nn.Module], known: Mapping[str, object]
) -> Iterator[tuple[str, dict[str, str]]]:
    """Each attention's name, and by part the names of its projections that are ``known``."""
    for name, module in modules.items():
        if isinstance(module, nn.MultiheadAttention):
            parts = {part: f"{name}.{part}" for part in PARTS}
            found = {
                part: ours
                for part, ours in parts.items()
                if ours in known and isinstance(modules[ours], AdaptedLinear)
            }
            if found:
                yield name, found


def _filled(half: Tensor, rank: int, dim: int) -> Tensor:
    """Zeros behind ``half`` along ``dim``, up to ``rank``."""
    sizes = list(half.shape)
    sizes[dim] = rank - sizes[dim]
    return torch.cat([half, half.new_zeros(sizes)], dim) if sizes[dim] else half


def _cut(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Without the ranks behind ``rank``, where they compute nothing."""
    if len(a) > rank and not torch.count_nonzero(b[:, rank:]):
        return a[:rank], b[:, :rank]
    return a, b
