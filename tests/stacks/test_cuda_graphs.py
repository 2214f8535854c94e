"""A captured training step replays to what eager steps come to."""

from __future__ import annotations

import pytest
import torch

from tests.stacks.sample import batch, close, loss_of, patched, train, trained


@pytest.mark.gpu
def test_a_captured_step_replays():
    model = patched().cuda()
    x, labels = (tensor.cuda() for tensor in batch())
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.1)
    start = {name: p.detach().clone() for name, p in trained(model).items()}

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss_of(model, x, labels).backward()
        optimizer.step()

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        step()
    with torch.no_grad():
        for name, parameter in trained(model).items():
            parameter.copy_(start[name])
    for _ in range(3):
        graph.replay()
    found = {name: p.detach().cpu() for name, p in trained(model).items()}
    close(found, train(patched()), rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
def test_a_graphed_callable_gives_what_eager_gives():
    """``torch.cuda.make_graphed_callables`` around a whole patched model, forward and backward."""
    model, plain = patched().cuda(), patched().cuda()
    x, labels = (tensor.cuda() for tensor in batch())
    graphed = torch.cuda.make_graphed_callables(model, (x.clone(),))
    for each in (graphed, plain):
        loss_of(each, x, labels).backward()
    for name, parameter in trained(plain).items():
        torch.testing.assert_close(trained(model)[name].grad, parameter.grad, rtol=1e-3, atol=1e-5)
