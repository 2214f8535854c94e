"""Two gloo processes with half a batch each: the gradients of one process with all of it."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fused_lora


class Attention(nn.Module):
    """Names and shapes of an attention, which is all that sharing looks at."""

    def __init__(self, dim):
        super().__init__()
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v))


class Block(nn.Module):
    """Of a transformer; written here because the processes import this file, and timm is slow."""

    def __init__(self, dim):
        super().__init__()
        self.attn, self.mlp = Attention(dim), nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x):
        x = x[..., : self.attn.proj.in_features]
        return self.mlp.fc2(torch.tanh(self.mlp.fc1(x + self.attn(x))))


class Both(nn.Module):
    """A teacher and its student, run one after the other."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.teacher = nn.Sequential(Block(12), Block(12)).double()
        self.student = nn.Sequential(Block(8)).double()
        x, options = torch.zeros(1, 5, 12).double(), {"adapter_dtype": torch.float64}
        fused_lora.patch(self.teacher, 4, example_input=x, **options)
        for module in self.teacher.modules():
            for _, b in (
                module.adapters() if isinstance(module, fused_lora.nn.AdaptedLinear) else ()
            ):
                nn.init.normal_(b)
        fused_lora.share_adapters(self.teacher, self.student, "last", example_input=x)

    def forward(self, x):
        return self.teacher(x).square().sum() + self.student(x).square().sum()


def grads(both):
    return {name: p.grad for name, p in both.named_parameters() if p.requires_grad}


def halves():
    return torch.randn(4, 5, 12, generator=torch.Generator().manual_seed(1)).double().chunk(2)


def process(rank, folder, both):
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"  # a port may be taken between its choice and its use
    torch.distributed.init_process_group("gloo", meet, rank=rank, world_size=2)
    for bucket_view in (False, True):
        ddp = DistributedDataParallel(both, gradient_as_bucket_view=bucket_view)
        for _ in range(2):  # the second time into gradients that are there
            ddp(halves()[rank]).backward()
        torch.save(grads(both), f"{folder}/{rank}_{bucket_view}.pt")
        both.zero_grad()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path):
    both = Both()
    torch.multiprocessing.spawn(process, (str(tmp_path), both), nprocs=2)
    for half in halves():
        both(half).backward()
    for bucket_view in (False, True):
        first, second = (torch.load(tmp_path / f"{rank}_{bucket_view}.pt") for rank in range(2))
        assert first.keys() == second.keys() == grads(both).keys()
        for name, grad in grads(both).items():  # the mean of two halves, twice, is their sum
            torch.testing.assert_close(first[name], grad)
            assert torch.equal(first[name], second[name])
