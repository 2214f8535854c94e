"""The two ends of the scale: nothing is trained, and everything is."""

from __future__ import annotations

from torch import Tensor, nn

from fused_lora.bench.registry import Contender, register


def let_gradient_in(module: nn.Module, args: tuple, tokens: Tensor) -> None:
    """A forward hook of the embedding: its output asks for a gradient."""
    tokens.requires_grad_()


@register
class Frozen(Contender):
    """The floor: no weight trains, yet the gradient still crosses every block.

    Training adapters always costs this crossing. The embedded tokens ask for a gradient, so
    block 0 computes one as well, which the adapted networks can skip: the floor is a hair high.
    """

    name, title, form = "frozen", "frozen network", "none"

    def install(self, model: nn.Module, rank: int) -> nn.Module:
        """Only open the way for the gradient; ``rank`` is not used."""
        if isinstance(embed := getattr(model, "patch_embed", None), nn.Module):
            embed.register_forward_hook(let_gradient_in)
        return model


@register
class Full(Contender):
    """Full fine-tuning: every weight of the network trains."""

    name, title, form, owns_weights = "full", "full fine-tuning", "none", True

    def install(self, model: nn.Module, rank: int) -> nn.Module:
        """Unfreeze; ``rank`` is not used."""
        return model.requires_grad_(True)
