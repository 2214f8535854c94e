"""What the host does in a training step: a network so small that its arithmetic costs nothing.

Twelve blocks of width 48 on five tokens. Beside the time stand two counts that repeat exactly:
the Python calls of a step, and the operations that torch's dispatcher is asked for.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fused_lora.bench.clock import Step
from fused_lora.bench.registry import suite
from fused_lora.bench.shapes import ModelShape
from fused_lora.bench.suites.train_step import TrainStep

NAME = "vit_host"


@suite("host")
class HostStep(TrainStep):
    """Forward and backward; the images ask for a gradient, so that every block's input does."""

    counts_host = True

    def __init__(self, shape: ModelShape, batch: int, dtype: str, device: str) -> None:
        super().__init__(shape, batch, dtype, device)
        self.inputs = [image.requires_grad_() for image in self.inputs]

    def network(self) -> nn.Module:
        """A timm ViT in miniature."""
        from timm.models.vision_transformer import VisionTransformer

        sizes: dict[str, Any] = {
            "img_size": 32,
            "patch_size": 16,
            "embed_dim": self.shape.width,
            "num_heads": 3,
        }
        return VisionTransformer(depth=12, num_classes=10, **sizes)

    def optimizer(self, model: nn.Module) -> None:
        """None: it would do the same for all."""
        return


def host_work(step: Step, trained: list[Tensor]) -> tuple[int, int]:
    """Python calls and dispatched operations of one step; gradients are dropped before each."""
    count = 0

    def seen(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    _drop(trained)
    sys.setprofile(seen)
    try:
        step()
    finally:
        sys.setprofile(None)
    _drop(trained)
    with Operations() as operations:
        step()
    return count, operations.count


class Operations(TorchDispatchMode):
    """Counts what the dispatcher is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Count and run."""
        self.count += 1
        return func(*args, **(kwargs or {}))


def _drop(trained: list[Tensor]) -> None:
    for parameter in trained:
        parameter.grad = None
