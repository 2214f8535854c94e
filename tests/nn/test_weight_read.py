"""A weight that reads w': who may write it, and where the write goes."""

import copy

import pytest
import timm
import torch
import torchvision
from torch import nn

import fused_lora
from tests.patching.models import wake


def torchvision_vit():
    """Bare weights of torch's own attention."""
    model = torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=5)
    nn.init.normal_(model.heads.head.weight)
    return model, model.encoder.layers[0].self_attention, "in_proj_weight"


def beit():
    """A linear whose weight its attention reads."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3}
    model = timm.create_model("beit_base_patch16_224", depth=2, num_classes=5, **sizes)
    nn.init.normal_(model.head.weight)
    return model, model.blocks[0].attn.qkv, "weight"


BUILDERS = {"torchvision": torchvision_vit, "beit": beit}
every = pytest.mark.parametrize("name", BUILDERS)
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def patched(name):
    """(model, who holds the weight, the weight's name, w)."""
    torch.manual_seed(0)
    model, holder, tensor = BUILDERS[name]()
    fused_lora.patch(model.eval(), rank=4)
    wake(model)
    return model, holder, tensor, holder._parameters[tensor].clone()


WRITES = {
    "copy_": lambda w, new: w.detach().copy_(new),
    "data": lambda w, new: setattr(w, "data", new.clone()),
    "data.copy_": lambda w, new: w.data.copy_(new),
    "a slice of it": lambda w, new: w[:].copy_(new),
    "flat": lambda w, new: w.view(-1).copy_(new.flatten()),
    "by thirds": lambda w, new: [a.copy_(b) for a, b in zip(w.chunk(3), new.chunk(3), strict=True)],
    "item": lambda w, new: w.__setitem__(slice(None), new),
    "out": lambda w, new: torch.mul(new, 1, out=w),
}


@every
@pytest.mark.parametrize("write", WRITES)
def test_a_write_is_a_write_of_the_frozen_weight(name, write):
    model, holder, tensor, w = patched(name)
    before = model(X).detach()
    delta = getattr(holder, tensor).detach() - w
    new = torch.randn_like(w)
    with torch.no_grad():
        WRITES[write](getattr(holder, tensor), new)
    assert torch.equal(holder._parameters[tensor], new)
    torch.testing.assert_close(getattr(holder, tensor).detach(), new + delta)
    assert float((model(X).detach() - before).abs().max()) > 1e-3
    fused_lora.unpatch(model)
    assert torch.equal(getattr(holder, tensor), new)


@every
@pytest.mark.parametrize("init", ["normal_", "xavier_uniform_", "kaiming_normal_", "orthogonal_"])
def test_inits_of_torch(name, init):
    _, holder, tensor, w = patched(name)
    torch.manual_seed(3)
    getattr(nn.init, init)(getattr(holder, tensor))
    torch.manual_seed(3)
    assert torch.equal(holder._parameters[tensor], getattr(nn.init, init)(w))


@every
def test_a_copy_is_a_copy_and_a_view_is_a_view(name):
    _, holder, tensor, w = patched(name)
    getattr(holder, tensor).detach().t().reshape(-1).zero_()
    assert torch.equal(holder._parameters[tensor], w)
    with torch.no_grad():
        getattr(holder, tensor).t()[:, 1:].narrow(1, 0, 2).zero_()
    assert not holder._parameters[tensor][1:3].any()
    assert torch.equal(holder._parameters[tensor][3:], w[3:])


@every
def test_setting_the_attribute_sets_the_parameter(name):
    model, holder, tensor, w = patched(name)
    new = nn.Parameter(torch.randn_like(w), requires_grad=False)
    setattr(holder, tensor, new)
    assert holder._parameters[tensor] is new and model(X).isfinite().all()
    assert isinstance(dict(model.named_parameters())[_name_of(model, new)], nn.Parameter)


def _name_of(model, parameter):
    return next(name for name, each in model.named_parameters() if each is parameter)


@every
def test_get_parameter_of_every_name(name):
    model, holder, tensor, w = patched(name)
    for key, parameter in model.named_parameters():
        found = model.get_parameter(key)
        assert isinstance(found, nn.Parameter) and found.shape == parameter.shape
        with torch.no_grad():
            found.zero_()
        assert not parameter.any()


@every
def test_prune_and_parametrise_are_refused_and_nothing_is_lost(name):
    model, holder, tensor, w = patched(name)
    expected = model(X).detach()
    tries = (
        lambda: nn.utils.parametrizations.weight_norm(holder, tensor),
        lambda: nn.utils.parametrize.register_parametrization(holder, tensor, nn.Identity()),
        lambda: nn.utils.prune.l1_unstructured(holder, tensor, 0.5),
    )
    for attempt in tries:
        with pytest.raises((RuntimeError, ValueError), match="unpatch the model|Cannot assign"):
            attempt()
        assert torch.equal(model(X), expected) and torch.equal(holder._parameters[tensor], w)
    fused_lora.unpatch(model)
    nn.utils.prune.l1_unstructured(holder, tensor, 0.5)
    assert model(X).isfinite().all()


def replica_of(model):
    """One copy as ``nn.DataParallel`` makes it (torch.nn.parallel.replicate), on this device."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, made in copies.items():
        for key, child in module._modules.items():
            if child is not None:
                setattr(made, key, copies[child])
        for key, parameter in module._parameters.items():
            if parameter is None:
                made._parameters[key] = None
            else:
                setattr(made, key, parameter * 1.0)
        for key, buffer in module._buffers.items():
            if buffer is not None:
                setattr(made, key, buffer.clone())
    return copies[model]


@every
def test_a_copy_of_data_parallel(name):
    model, _, _, _ = patched(name)
    made = replica_of(model.train())
    y = made(X)
    torch.testing.assert_close(y, model(X))
    y.square().sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model(X).square().sum().backward()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(found[key], parameter.grad)


@every
def test_a_copy_of_data_parallel_reads_its_own_weight(name):
    model, holder, tensor, w = patched(name)
    made = replica_of(model)
    mine = next(m for m, c in zip(model.modules(), made.modules(), strict=True) if m is holder)
    theirs = next(c for m, c in zip(model.modules(), made.modules(), strict=True) if m is mine)
    with torch.no_grad():
        theirs.__dict__[tensor].add_(1.0)
    torch.testing.assert_close(
        getattr(theirs, tensor).detach(), getattr(holder, tensor).detach() + 1
    )


@every
def test_deepcopy_and_half_and_compile(name):
    model, holder, tensor, _ = patched(name)
    expected = model(X).detach()
    torch.testing.assert_close(copy.deepcopy(model)(X), expected)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), expected, rtol=1e-4, atol=1e-5)
    assert model.to(torch.bfloat16)(X.bfloat16()).dtype is torch.bfloat16


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone."""
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@every
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1_is_refused_by_name(one_process, name, use_orig_params):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model, holder, tensor, w = patched(name)
    y = model(X).detach()
    model.requires_grad_(True)  # without use_orig_params all must train or none
    with pytest.raises(RuntimeError, match=r"FSDP1.*fully_shard"):
        FullyShardedDataParallel(
            model, use_orig_params=use_orig_params, device_id=torch.device("cpu")
        )
    assert torch.equal(holder._parameters[tensor], w)
    if use_orig_params:
        torch.testing.assert_close(model(X).detach(), y)
