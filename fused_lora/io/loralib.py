"""loralib's checkpoints: its Linear has our keys; its MergedLinear stacks q, k and v.

loralib   lora_A [G R, K]   lora_B [G N/3, R]      G of q, k and v enabled, one below the other
ours      lora_A_q [R, K]   lora_B_q [N/3, R]      and so on, for each of them
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from fused_lora.io.keys import AdapterFileError, adapted, plain, unwrapped
from fused_lora.nn.variants import key_of


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
