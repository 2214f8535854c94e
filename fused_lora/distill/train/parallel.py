"""A module over the processes of a run: whole in each (DDP), or in shards (FSDP2).

Under FSDP2 each block of each model is a unit, gathered when it computes. Adapters of which a
student has parts stay whole in every process, since its blocks compute while their owner's are in
shards; their gradients are averaged here, in one message.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import distributed, nn

from fused_lora.distill.share import shared_parameters
from fused_lora.distill.stack import stacks_of
from fused_lora.distill.train.world import World


@dataclass(frozen=True)
class Spread:
    """What to call in place of the module, and which parameters are left to ``settle``."""

    module: nn.Module
    whole: list[nn.Parameter] = field(default_factory=list)

    def unsynced(self, last: bool) -> AbstractContextManager:
        """Gradients stay at home in all micro-steps but the last."""
        if isinstance(self.module, nn.parallel.DistributedDataParallel) and not last:
            return self.module.no_sync()
        if hasattr(self.module, "set_requires_gradient_sync"):
            self.module.set_requires_gradient_sync(last)  # type: ignore[operator]
        return nullcontext()

    def settle(self) -> None:
        """After the last micro-step: the mean over the processes of what FSDP2 leaves alone."""
        if not self.whole:
            return
        for each in self.whole:
            each.grad = torch.zeros_like(each) if each.grad is None else each.grad
        grads = [each.grad for each in self.whole if each.grad is not None]
        message = torch.cat([grad.flatten() for grad in grads])
        distributed.all_reduce(message)
        message /= distributed.get_world_size()
        for grad, part in zip(grads, message.split([g.numel() for g in grads]), strict=True):
            grad.copy_(part.view_as(grad))


def spread(module: nn.Module, world: World, device: torch.device, parallel: str) -> Spread:
    """``module`` whose gradients are averaged over the processes.

    Args:
        module: on ``device``, the same in every process.
        world: one process leaves the module as it is.
        device: of this process.
        parallel: "ddp" | "fsdp2", which shards ``module`` itself.
    """
    if world.size == 1:
        return Spread(module)
    if parallel == "fsdp2":
        return Spread(module, shard(module, world, device))
    ids = [device.index] if device.type == "cuda" else None
    return Spread(nn.parallel.DistributedDataParallel(module, device_ids=ids))


def shard(module: nn.Module, world: World, device: torch.device) -> list[nn.Parameter]:
    """Shard ``module`` over the processes, block by block; back come the parameters left whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world.size,))
    whole = shared_parameters(module)
    blocks = [block for stack in stacks_of(module) for block in stack.blocks]
    for unit in (*blocks, module):
        fully_shard(unit, mesh=mesh, ignored_params=set(whole))
    return whole
