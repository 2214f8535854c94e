"""A training step of a whole network: forward, loss, backward, AdamW."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_lora.bench.registry import suite
from fused_lora.bench.shapes import ModelShape
from fused_lora.bench.workload import Workload, blocks

# AdamW whose moments are shared: methods take turns, so one set of moments serves them all.
#
# Four methods of rank 512 on a ViT-B would hold 2.7 GB of moments; nothing that is measured or
# judged depends on their values.


Key = tuple[torch.Size, torch.dtype, int, str]  # the last two: which of that shape, which moment


class Moments:
    """A pool of moments by shape; each lives as long as an optimizer that uses it."""

    def __init__(self) -> None:
        self._pool: WeakValueDictionary[Key, Tensor] = WeakValueDictionary()

    def adamw(self, parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.AdamW:
        """An optimizer of ``parameters`` with moments from the pool."""
        trained = list(parameters)
        optimizer = torch.optim.AdamW(trained, lr=lr, fused=True)
        seen: Counter[tuple[torch.Size, torch.dtype]] = Counter()
        for parameter in trained:
            seen[parameter.shape, parameter.dtype] += 1
            turn = seen[parameter.shape, parameter.dtype]
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": self._shared(parameter, turn, "exp_avg"),
                "exp_avg_sq": self._shared(parameter, turn, "exp_avg_sq"),
            }
        return optimizer

    def _shared(self, parameter: nn.Parameter, turn: int, moment: str) -> Tensor:
        key = (parameter.shape, parameter.dtype, turn, moment)
        held = self._pool.get(key)
        if held is None:
            held = self._pool[key] = torch.zeros_like(parameter, requires_grad=False)
        return held


def build(
    name: str | Callable[[], nn.Module], device: str, dtype: torch.dtype, seed: int = 0
) -> nn.Module:
    """The timm model ``name``, or what ``name`` makes, frozen, with seeded random weights.

    Built on the meta device: timm's own initialisation takes longer than a training step.
    """
    import timm

    with torch.device("meta"):
        model = name() if callable(name) else timm.create_model(name, pretrained=False)
    model = model.to(dtype).to_empty(device=device).requires_grad_(False)
    generator = torch.Generator(device).manual_seed(seed)
    for path, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.02, generator=generator)
        else:
            parameter.fill_(0.0 if path.endswith("bias") else 1.0)
    return model.train()


@suite("train_step")
class TrainStep(Workload):
    """Cross-entropy on random images and labels; AdamW on whatever the method trains."""

    def __init__(self, shape: ModelShape, batch: int, dtype: str, device: str) -> None:
        super().__init__(shape, batch, dtype, device)
        generator = torch.Generator().manual_seed(1)
        self.base = build(self.network, device, self.stored)
        size = self.base.get_submodule("patch_embed").img_size
        images = torch.randn(batch, 3, *cast("tuple[int, int]", size), generator=generator)
        self.inputs = [images.to(device, self.stored)]
        self.moments = Moments()
        self.labels = torch.randint(1000, (batch,), generator=generator).to(device)

    def network(self) -> nn.Module:
        """The network, on the default device."""
        import timm

        return timm.create_model(self.shape.name, pretrained=False)

    def forward(self, model: nn.Module, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        """The logits, or the features of a model without a head."""
        return (model(*inputs),)

    def backward(self, outputs: tuple[Tensor, ...]) -> None:
        """The loss, and its gradient back."""
        labels = self.labels[: len(outputs[0])] % outputs[0].shape[-1]
        logits = outputs[0] if outputs[0].dtype is torch.float64 else outputs[0].float()
        F.cross_entropy(logits, labels).backward()

    def sections(self, model: nn.Module) -> Iterable[nn.Module]:
        """The transformer blocks."""
        return blocks(model)

    def excluded(self) -> list[Tensor]:
        """The images."""
        return self.inputs

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer | None:
        """AdamW on the trained parameters; None when there are none."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return self.moments.adamw(trained, lr=1e-4) if trained else None
