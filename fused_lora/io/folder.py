"""save and load: one model's adapters, one folder in PEFT's format."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from fused_lora.arguments import flag, folder_of, one_of, strings
from fused_lora.io import convolutions
from fused_lora.io.attention import from_peft, to_peft
from fused_lora.io.files import CONFIG, TENSORS, Content, pack, read_pair, unpack, write_pair
from fused_lora.io.fuse import Group, groups_of, outer_scale, total_rank
from fused_lora.io.keys import (
    PREFIX,
    UNFOLDED,
    AdapterFileError,
    a_key,
    adapted,
    b_key,
    check_keys,
    module_names,
    old_names,
    renamed,
    shortened,
    unwrapped,
)
from fused_lora.io.peft import BLOCKS, LAYOUTS, Settings, config_for, dense, in_blocks, settings_of
from fused_lora.io.state_dict import (
    Changes,
    adapter_changes,
    check_values,
    tensors_of,
    values_of,
    writable,
)
from fused_lora.io.trained import LeftOut, check_adapted, trained_modules, whole_state
from fused_lora.nn import AdaptedLinear
from fused_lora.ops.operand import gathered, writes


def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    trainable: bool = True,
    layout: str = "dense",
    fold_mid: bool = False,
) -> None:
    """Write the adapters of a patched model as PEFT does; ``PeftModel.from_pretrained`` reads them.

    What init="pissa" or "olora" took from the base is written as so many ranks more, against the
    original base, as PEFT's own conversion does. Separate adapters on a fused qkv are written as
    the one adapter of rank sum R that they are together; ``load`` takes them apart again, bit for
    bit. Where the model is sharded (FSDP2) every process must call this, and the first one writes.

    Args:
        model: a patched model, merged or not.
        folder: made if need be; an adapter already there is replaced, both files or neither.
        trainable: also write, whole, the modules that own parameters training beside the
            adapters (a head), as PEFT's ``modules_to_save``; False leaves them out.
        layout: of separate adapters on one linear: "dense", which every release of PEFT reads, or
            "blocks", PEFT's BdLora: a third of the bytes of b on a fused qkv, and PEFT trains on
            with the three apart. ``load`` reads both.

    Raises:
        AdapterFileError: no adapters, values that are not finite, a trained parameter for which
            PEFT has no place, or a file where the folder should be.
    """
    folder, model = folder_of(folder, error=AdapterFileError), unwrapped(model)
    one_of("layout", layout, LAYOUTS, AdapterFileError)
    flag("trainable", trainable, AdapterFileError)
    flag("fold_mid", fold_mid, AdapterFileError)
    modules = adapted(model)
    others = trained_modules(model) if trainable else []
    held = {name: values_of(module, name, fold_mid) for name, module in modules.items()}
    groups = {name: each.groups for name, each in held.items()}
    dora = dora_of(modules)
    tensors, blocks = tensors_of(held, modules), {}
    if layout == "blocks":
        if dora:
            raise AdapterFileError('layout="blocks": PEFT\'s BdLora has no dora; save it "dense"')
        if any(isinstance(each, nn.MultiheadAttention) for each in module_names(model).values()):
            raise AdapterFileError(
                'layout="blocks": PEFT\'s BdLora has no MultiheadAttention; save it "dense"'
            )
        tensors, blocks[BLOCKS] = in_blocks(tensors, groups)
    ranks = {name: total_rank(each) for name, each in groups.items()}
    scales = {name: outer_scale(each) for name, each in groups.items()}
    tensors, ranks, scales = to_peft(module_names(model), tensors, ranks, scales)
    tensors, ranks, scales = convolutions.to_peft(module_names(model), tensors, ranks, scales)
    for key, tensor in whole_state(model, others).items():
        check_values(tensor, key)
        tensors[key] = gathered(tensor)
    config = _config(model, ranks, scales, others) | blocks | {"use_dora": dora}
    text = json.dumps(config, indent=2) + "\n"
    if writes(model):
        write_pair(folder, text.encode(), pack(tensors, groups, config))


def load(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    leave_out: Iterable[str] | str = (),
    allow_rounding: bool = False,
) -> list[str]:
    """Copy an adapter, written by ``save`` or by PEFT, into a model patched like it.

    Everything is checked before anything is changed. Scales are set as the files say; dropout,
    what trains, and dtypes stay the model's own.

    Args:
        model: a patched model, not merged.
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        leave_out: regular expressions on the names of modules that the file has and the model
            does without: a convolution that PEFT adapted, or a head saved whole.
        allow_rounding: round what the model holds in fewer bits than the file, such as an fp32
            head into a bf16 model; otherwise that is an error.

    Returns:
        The keys set besides the adapters' (``modules_to_save``).

    Raises:
        AdapterFileError: files missing, damaged or not of one save, an option that cannot be
            served, or a key, shape or value that does not fit the model; it is left as it was.
    """
    folder, model = folder_of(folder, error=AdapterFileError), unwrapped(model)
    patterns = strings("leave_out", leave_out, AdapterFileError)
    flag("allow_rounding", allow_rounding, AdapterFileError)
    modules = writable(model)
    text, blob = read_pair(folder)
    config = _parsed(text, str(folder / CONFIG))
    settings = settings_of(config, str(folder / CONFIG))
    if settings.dora != dora_of(modules):
        raise AdapterFileError(
            f"{folder / CONFIG}: use_dora is {settings.dora}, and the model was patched with "
            f"dora={not settings.dora}: patch it with dora={settings.dora}"
        )
    content = unpack(blob, config, str(folder / TENSORS))
    left_out = LeftOut.by(patterns, content.tensors, settings.modules_to_save)
    changes, others = _changes(model, modules, settings, content, left_out, str(folder / TENSORS))
    changes.check_rounding(allow_rounding)
    changes.apply()
    return others


def dora_of(modules: Mapping[str, AdaptedLinear]) -> bool:
    """Whether they have magnitudes; raises AdapterFileError where some have and some do not."""
    kinds = {module.config.dora for module in modules.values()}
    if len(kinds) > 1:
        without = shortened(name for name, module in modules.items() if not module.config.dora)
        raise AdapterFileError(f"PEFT's use_dora holds of all or none, and {without} has no dora")
    return kinds.pop()


def _config(
    model: nn.Module, ranks: Mapping[str, int], scales: Mapping[str, float], others: list[str]
) -> dict[str, Any]:
    base = getattr(model, "name_or_path", None)
    return config_for(
        ranks,
        scales,
        module_names(model),
        others,
        max(module.config.dropout for module in adapted(model).values()),
        base if isinstance(base, str) else None,
    )


def _parsed(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise AdapterFileError(f"{where}: no JSON: {error}") from None


def _changes(
    model: nn.Module,
    modules: Mapping[str, AdaptedLinear],
    settings: Settings,
    content: Content,
    left_out: LeftOut,
    where: str,
) -> tuple[Changes, list[str]]:
    adapters: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    own = tuple(key for name in modules for key in (a_key(name), b_key(name)))
    for key, tensor in content.tensors.items():
        if left_out.holds(key):
            continue
        kind = adapters if key in own or ".lora_" in key or key.startswith(UNFOLDED) else others
        kind[key] = tensor
    adapters, settings = from_peft(module_names(model), adapters, settings, where)
    adapters, settings = convolutions.from_peft(module_names(model), adapters, settings)
    old = old_names(modules, adapters)
    adapters = {renamed(key, old): tensor for key, tensor in adapters.items()}
    former = {new: name for name, new in old.items()}
    groups = {
        name: _groups(
            former.get(name, name), module, adapters.get(a_key(name)), settings, content, where
        )
        for name, module in modules.items()
    }
    if settings.blocks is not None:
        for name in modules:
            if settings.blocks.holds(former.get(name, name)) and b_key(name) in adapters:
                at = f"{where}: {b_key(name)}"
                adapters[b_key(name)] = dense(adapters[b_key(name)], settings.blocks, at)
    check_adapted(module_names(model), modules, adapters, where)
    changes = adapter_changes(modules, adapters, groups, where)
    whole = whole_state(model, settings.modules_to_save)
    expected = {key: tensor for key, tensor in whole.items() if not left_out.holds(key)}
    check_keys(f"{where}, beside the adapters", expected, others)
    for key, tensor in others.items():
        changes.add(expected[key], tensor, f"{where}: {key}")
    return changes, sorted(key.removeprefix(PREFIX) for key in others)


def _groups(
    name: str,
    module: AdaptedLinear,
    a: Tensor | None,
    settings: Settings,
    content: Content,
    where: str,
) -> tuple[Group, ...]:
    rank = settings.rank_of(name)
    if a is not None and a.shape[:1] != (rank,):
        raise AdapterFileError(
            f"{where}: {a_key(name)} has shape {tuple(a.shape)}, but the config gives rank {rank}"
        )
    noted = content.groups.get(name, ())
    if [(group.name, group.span) for group in noted] == list(module.groups.items()):
        return noted
    return groups_of(module, settings.scale_of(name))
