"""Names of tensors in adapter files, as PEFT and loralib have them; what is wrong with others."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from fused_lora.arguments import module_of
from fused_lora.nn import AdaptedLinear
from fused_lora.nn.shared import SharedLoRALinear
from fused_lora.nn.variants import key_of


class AdapterFileError(ValueError):
    """The adapter cannot be saved or loaded as asked; model and files were left as they were."""


PREFIX = "base_model.model."
UNFOLDED = "fused_lora.b."  # before <module>.<group>: a b that its fold into lora_B would round


def a_key(module: str) -> str:
    """The key of a [R, K]."""
    return f"{PREFIX}{module}.lora_A.weight"


def b_key(module: str) -> str:
    """The key of b [N, R]."""
    return f"{PREFIX}{module}.lora_B.weight"


def magnitude_key(module: str) -> str:
    """The key of DoRA's m [N]."""
    return f"{PREFIX}{module}.lora_magnitude_vector"


def unfolded_key(module: str, group: str) -> str:
    """The key of one group's own b; PEFT passes over it."""
    return f"{UNFOLDED}{module}.{group}"


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside a data-parallel wrapper, which would put ``module.`` before every name."""
    while isinstance(model, (DataParallel, DistributedDataParallel)):
        model = model.module
    return model


def module_names(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by the dotted name that it has in the vanilla model."""
    return {plain(name): module for name, module in model.named_modules()}


def plain(name: str) -> str:
    """``name`` without what ``torch.compile`` puts in."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def adapted(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The adapted linears by dotted name; raises AdapterFileError if the model has none."""
    module_of(model, error=AdapterFileError)
    names = module_names(model)
    found = {name: m for name, m in names.items() if isinstance(m, AdaptedLinear)}
    if not found and any(name.endswith(".lora_A") for name in names):
        raise AdapterFileError(
            f"{type(model).__name__} carries PEFT's adapters: call its save_pretrained, "
            "load_adapter or PeftModel.from_pretrained"
        )
    if not found:
        raise AdapterFileError(
            f"{type(model).__name__} carries no adapters: call fused_lora.patch on it first"
        )
    if "" in found:
        raise AdapterFileError(
            f"the model itself is a {type(model).__name__}: its adapter has no dotted name; put "
            "the layer inside a module"
        )
    return found


def unmerged(model: nn.Module) -> dict[str, AdaptedLinear]:
    """``adapted(model)``; raises AdapterFileError where one is merged, or another model's."""
    found = adapted(model)
    for name, module in found.items():
        if isinstance(module, SharedLoRALinear):
            raise AdapterFileError(
                f"{name} shares its teacher's adapters, which loading would overwrite: load into "
                "the teacher, or call fused_lora.unshare_adapters first"
            )
        if module.merged:
            raise AdapterFileError(f"{name} is merged: call fused_lora.unmerge before loading")
    return found


def shortened(names: Iterable[str]) -> str:
    """The first three of ``names``, and how many more there are."""
    listed = sorted(names)
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return ", ".join(listed[:3]) + more


def check_keys(where: str, expected: Iterable[str], found: Iterable[str]) -> None:
    """Raises AdapterFileError unless both name the same keys."""
    expected, found = set(expected), set(found)
    missing, unexpected = expected - found, found - expected
    differences = [f"missing {shortened(missing)}"] * bool(missing)
    differences += [f"unexpected {shortened(unexpected)}"] * bool(unexpected)
    if differences:
        raise AdapterFileError(
            f"{where}: {'; '.join(differences)} ({len(found)} keys found, the model has "
            f"{len(expected)}): patch the model as it was when the adapter was saved"
        )


# A module's name in another release of the same model: same block, same role.
#
# transformers 5 calls ``layers.0.attention.q_proj`` what 4 called
# ``encoder.layer.0.attention.attention.query``. What they share is the numbers on the way, in
# order, and the role at the end. Where that finds exactly one name for each, it is a translation.


SUFFIXES = (  # the first that matches decides
    (r"(q_proj|query|to_q|wq)$", "q"),
    (r"(k_proj|key|to_k|wk)$", "k"),
    (r"(v_proj|value|to_v|wv)$", "v"),
    (r"(qkv|to_qkv|Wqkv)$", "qkv"),
    (r"(attention\.output\.dense|(attn|attention)\.(proj|projection|out_proj|o_proj))$", "out"),
    (r"(o_proj|out_proj)$", "out"),
    (r"(intermediate\.dense|fc1|lin1)$", "fc1"),
    (r"(output\.dense|fc2|lin2)$", "fc2"),
    (r"(gate_proj|fc1_g)$", "gate"),
    (r"up_proj$", "up"),
    (r"down_proj$", "down"),
)


def old_names(modules: Iterable[str], adapters: Iterable[str]) -> dict[str, str]:
    """The model's names of the file's, where the file has those of another release."""
    tails = [a_key("").removeprefix(PREFIX), b_key("").removeprefix(PREFIX)]
    found = {
        key.removeprefix(PREFIX).removesuffix(tail)
        for key in adapters
        for tail in tails
        if key.startswith(PREFIX) and key.endswith(tail)
    }
    return {} if found <= set(modules) else translation(found, modules)


def renamed(key: str, names: Mapping[str, str]) -> str:
    """``key`` of an adapter under the model's name."""
    for make in (a_key, b_key, magnitude_key):
        for old, new in names.items():
            if key == make(old):
                return make(new)
    return key


def translation(found: Iterable[str], wanted: Iterable[str]) -> dict[str, str]:
    """The model's name of each name ``found`` in a file; empty where there is no single one."""
    found, wanted = sorted(set(found)), sorted(set(wanted))
    places = {_place(name): name for name in wanted}
    of_file = {_place(name): name for name in found}
    distinct = len(places) == len(wanted) and len(of_file) == len(found)
    if None in places or not distinct or places.keys() != of_file.keys():
        return {}
    return {name: places[place] for place, name in of_file.items()}


def _place(name: str) -> tuple[tuple[int, ...], str] | None:
    numbers = tuple(int(part) for part in name.split(".") if part.isdecimal())
    roles = (role for ending, role in SUFFIXES if re.search(rf"(^|\.){ending}", name))
    role = next(roles, None)
    return (numbers, role) if role and numbers else None


# loralib's checkpoints: its Linear has our keys; its MergedLinear stacks q, k and v.
#
# loralib   lora_A [G R, K]   lora_B [G N/3, R]      G of q, k and v enabled, one below the other
# ours      lora_A_q [R, K]   lora_B_q [N/3, R]      and so on, for each of them


def from_loralib(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` of a loralib model under the keys of ``model``, for ``load_state_dict``.

    loralib keeps its alpha in no file: patch with ``alpha=`` as the model was made with.

    Args:
        model: patched alike: an adapter each for what ``enable_lora`` enabled.
        state: what ``model.state_dict()`` or ``loralib.lora_state_dict(model)`` gave.

    Raises:
        AdapterFileError: adapters whose sizes do not fit those of ``model``.
    """
    found = dict(state)
    for name, module in adapted(unwrapped(model)).items():
        groups, prefix = module.groups, f"{plain(name)}."
        if "" in groups or f"{prefix}lora_A" not in found:
            continue
        a, b = found.pop(f"{prefix}lora_A"), found.pop(f"{prefix}lora_B", None)
        ranks, widths = ([getattr(s, of) for s in groups.values()] for of in ("rank", "width"))
        fits = len(set(ranks)) == 1 and a.shape[0] == sum(ranks)
        if b is None or not fits or tuple(b.shape) != (sum(widths), ranks[0]):
            raise AdapterFileError(
                f"{prefix}lora_A {tuple(a.shape)} and lora_B {b if b is None else tuple(b.shape)} "
                f"are not the adapters {list(groups)} of ranks {ranks} on {widths} columns, which "
                "the model has there: patch targets and rank as enable_lora and r were"
            )
        parts = zip(groups, a.split(ranks), b.split(widths), strict=True)
        for group, a_g, b_g in parts:
            found[prefix + key_of("lora_A", group)] = a_g
            found[prefix + key_of("lora_B", group)] = b_g
    return found
