"""A step recorded as a CUDA graph: its replay is the device's work without the host's."""

from __future__ import annotations

import torch

from fused_lora.bench.clock import Step

WARM_UP = 3  # runs on a side stream before recording, as torch asks for


def recorded(step: Step) -> Step:
    """The replay of ``step``, which must need nothing of the host but its launches."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
