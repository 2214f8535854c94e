"""torch.fx, feature extractors and TorchScript: of what unpatch(model, merge=True) leaves."""

import pytest
import torch
from torchvision.models.feature_extraction import create_feature_extractor

import fused_lora
from tests.patching.models import build, wake

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
TRACERS = {
    "fx": torch.fx.symbolic_trace,
    "TorchScript": torch.jit.script,
    "features": lambda model: create_feature_extractor(model, {"head": "y"}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tracer", TRACERS)
def test_after_unpatch_it_is_traced(tracer):
    model = build()
    fused_lora.patch(model, rank=4)
    y = wake(model)(X).detach()
    fused_lora.unpatch(model, merge=True)
    found = TRACERS[tracer](model)(X)
    found = found["y"] if isinstance(found, dict) else found
    torch.testing.assert_close(found.detach(), y, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("merged", [False, True])
def test_patched_it_is_refused_and_stays_as_it_was(tracer, merged):
    model = build()
    fused_lora.patch(model, rank=4)
    y = wake(model)(X).detach()
    if merged:
        fused_lora.merge(model)
    with pytest.raises((torch.fx.proxy.TraceError, ValueError, RuntimeError)):
        TRACERS[tracer](model)
    torch.testing.assert_close(model.eval()(X).detach(), y, rtol=1e-4, atol=1e-5)
    fused_lora.unpatch(model)
    assert type(model.blocks[0].mlp.fc1) is torch.nn.Linear
