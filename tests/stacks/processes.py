"""What each of two gloo processes does; the first one keeps what it found."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import fused_lora
from tests.patching.models import build
from tests.stacks.sample import batch, patched, train, trained

WORLD = 2


def mine() -> slice:
    """This process's part of the batch of four."""
    half = 4 // WORLD
    return slice(dist.get_rank() * half, (dist.get_rank() + 1) * half)


def shard(model: nn.Module, **options: Any) -> nn.Module:
    """FSDP2 as its tutorial has it: each block, then the root."""
    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def ddp() -> dict[str, torch.Tensor]:
    model = patched()
    return train(model, DistributedDataParallel(model), mine())


def ddp_static_bucket_views() -> dict[str, torch.Tensor]:
    model = patched()
    options = {"static_graph": True, "gradient_as_bucket_view": True, "bucket_cap_mb": 0.01}
    return train(model, DistributedDataParallel(model, **options), mine())


def ddp_compiled() -> dict[str, torch.Tensor]:
    model = patched(depth=1)
    wrapped = DistributedDataParallel(model)
    return train(model, torch.compile(wrapped, backend="aot_eager"), mine())


def ddp_accumulated() -> dict[str, torch.Tensor]:
    """Two passes over half a share each, the first without talk between the processes."""
    model = patched()
    wrapped, (x, labels) = DistributedDataParallel(model), batch()
    x, labels = x[mine()], labels[mine()]
    with wrapped.no_sync():
        (nn.functional.cross_entropy(wrapped(x[:1]), labels[:1]) / 2).backward()
    (nn.functional.cross_entropy(wrapped(x[1:]), labels[1:]) / 2).backward()
    return {name: p.grad for name, p in trained(model).items()}


def fsdp2() -> dict[str, torch.Tensor]:
    return train(shard(patched()), None, mine())


def fsdp2_compiled_then_sharded() -> dict[str, torch.Tensor]:
    model = patched(depth=1)
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    return train(shard(model), None, mine())


def fsdp2_dora_and_mid() -> dict[str, torch.Tensor]:
    return train(shard(patched(dora=True, mid="full")), None, mine())


def fsdp2_mixed_precision() -> list[torch.dtype]:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = shard(patched(), mp_policy=policy)
    y = model(batch()[0])
    y.float().sum().backward()
    return [y.dtype, *{p.grad.dtype for p in trained(model).values()}]


def fsdp2_state() -> dict[str, torch.Tensor]:
    return fused_lora.lora_state_dict(shard(patched()))


def fsdp2_load() -> dict[str, torch.Tensor]:
    model = shard(patched())
    state = {key: 2 * value for key, value in fused_lora.lora_state_dict(model).items()}
    fused_lora.load_lora_state_dict(model, state)
    return fused_lora.lora_state_dict(model)


def fsdp2_folder() -> dict[str, torch.Tensor]:
    folder = Path(os.environ["FUSED_LORA_TEST_FOLDER"]) / "adapter"
    fused_lora.save(shard(patched()), folder)
    dist.barrier()
    model = shard(patched())
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.zero_()
    fused_lora.load(model, folder)
    return fused_lora.lora_state_dict(model)


def fsdp2_refusals() -> dict[str, str]:
    model, plain = shard(patched()), shard(build())
    return {
        "merge": refusal(lambda: fused_lora.merge(model)),
        "unpatch": refusal(lambda: fused_lora.unpatch(model)),
        "patch": refusal(lambda: fused_lora.patch(plain)),
        "still works": str(model(batch()[0]).shape),
    }


def refusal(act: Callable[[], object]) -> str:
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


CASES = (
    ddp,
    ddp_static_bucket_views,
    ddp_compiled,
    ddp_accumulated,
    fsdp2,
    fsdp2_compiled_then_sharded,
    fsdp2_dora_and_mid,
    fsdp2_mixed_precision,
    fsdp2_state,
    fsdp2_load,
    fsdp2_folder,
    fsdp2_refusals,
)


def work(rank: int, folder: str) -> None:
    """One process: every case in turn."""
    os.environ |= {"FUSED_LORA_TEST_FOLDER": folder, "FUSED_LORA_CALIBRATE": "0"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=WORLD)
    found = {case.__name__: case() for case in CASES}
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    dist.destroy_process_group()
