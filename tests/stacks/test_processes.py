"""Two gloo processes come to what one process comes to: DDP, FSDP2, files, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

import fused_lora
from tests.stacks.processes import WORLD, work
from tests.stacks.sample import close, gradients, patched, train

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, object]:
    """What the first process found, by case."""
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(work, (str(folder),), WORLD)
    return torch.load(Path(folder) / "found.pt", weights_only=False)


@pytest.mark.parametrize("case", ["ddp", "ddp_static_bucket_views", "fsdp2"])
def test_training_comes_to_the_same(found, case):
    close(found[case], train(patched()))


@pytest.mark.parametrize("case", ["ddp_compiled", "fsdp2_compiled_then_sharded"])
def test_compiled_training_comes_to_the_same(found, case):
    close(found[case], train(patched(depth=1)))


def test_accumulation_without_talk(found):
    close(found["ddp_accumulated"], gradients(patched()))


def test_sharded_variants(found):
    close(found["fsdp2_dora_and_mid"], train(patched(dora=True, mid="full")))


def test_mixed_precision_keeps_gradients_wide(found):
    assert found["fsdp2_mixed_precision"] == [torch.bfloat16, torch.float32]


def test_a_sharded_model_gives_whole_tensors_and_takes_them(found):
    state = fused_lora.lora_state_dict(patched())
    close(found["fsdp2_state"], state, rtol=0, atol=0)
    close(found["fsdp2_folder"], state, rtol=0, atol=0)
    close(found["fsdp2_load"], {key: 2 * value for key, value in state.items()}, rtol=0, atol=0)


def test_what_would_be_lost_is_refused(found):
    said = found["fsdp2_refusals"]
    assert "PatchError: blocks.0.attn.qkv: merge: the weight is sharded" in said["merge"]
    assert "PatchError: blocks.0.attn.qkv: release: the weight is sharded" in said["unpatch"]
    assert "PatchError: cls_token is sharded over processes: patch first" in said["patch"]
    assert said["still works"] == "torch.Size([4, 10])"
