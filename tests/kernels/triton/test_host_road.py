"""Bound launches over a driver that runs nothing: kernels are told what Triton tells them."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from tests.kernels.triton import stub

KERNELS = {"shrink", "extended", "partial_sums", "add_slices", "layer_norm", "layer_norm_grad"}
KERNELS |= {"gelu_rows", "extended_bulk", "row_shrink_and_pack"}

pytestmark = stub.needed


def test_a_step_of_a_block_launches_what_triton_would(request, tmp_path):
    cache = request.config.cache.mkdir("triton")
    done = stub.run(tmp_path, "host_road", cache=cache)
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    said = {name: words for name, words in lines if name != "programs"}
    assert said.keys() >= KERNELS, said.keys()
    assert len(lines) > 30 and "OTHER" not in done.stdout, done.stdout
