"""A module's name in another release of the same model: same block, same role.

transformers 5 calls ``layers.0.attention.q_proj`` what 4 called
``encoder.layer.0.attention.attention.query``. What they share is the numbers on the way, in order,
and the role at the end. Where that finds exactly one name for each, it is a translation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from fused_lora.io.keys import PREFIX, a_key, b_key, magnitude_key

ENDINGS = (  # the first that matches decides
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
    roles = (role for ending, role in ENDINGS if re.search(rf"(^|\.){ending}", name))
    role = next(roles, None)
    return (numbers, role) if role and numbers else None
