"""What a driver or a device refuses is refused here too: the faults that ``planted.py`` plants.

It runs in a process over ``stub_driver.c``, which says no in a sentence. That it refuses no launch
that ships is asked where those are compiled, in test_resources.py.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from tests.kernels.triton import stub

pytestmark = stub.needed

FAULTS = {
    "grid: 65,536 blocks along y": "a grid of 1 x 65536 x 1 blocks",
    "block: 2,048 threads": "a block of 2048 threads",
    "block: other threads than it was compiled for": "is compiled for 128",
    "shared memory: beyond the attribute": "49152 are allowed",
    "shared memory: an attribute beyond the chip": "sm_90 has 232448",
    "module: a cubin of another chip": "a cubin of sm_90 on sm_80",
    "parameters: another kernel's": "9 parameters, _gelu_rows takes 10",
    "parameters: a wider one": "parameter 1 of _gelu_rows is 8 bytes at 8, passed are 4 at 8",
    "pointer: null": "parameter 0 of _gelu_rows is a null pointer",
    "pointer: freed memory": "a pointer to memory that is not alive",
    "pointer: freed memory, as a number": "points to memory that is not alive",
    "pointer: no multiple of 16, as it was compiled for": "compiled for multiples of 16 bytes",
    "map: an address that 16 does not divide": "address is no multiple of 16 bytes",
    "map: a stride that 16 does not divide": "stride of 258 bytes is no multiple of 16",
    "map: rows that overlap": "rows of 256 bytes overlap, 128 apart",
    "map: beyond the tensor": "of memory that is not alive",
    "map: freed memory": "of memory that is not alive",
    "map: a box of 512 rows": "box of 512 elements",
    "map: a box wider than its swizzle": "256 bytes wide, its swizzle 128",
}


@pytest.fixture(scope="module")
def said(request, tmp_path_factory) -> dict[str, str]:
    """What the driver said of each fault."""
    cache = request.config.cache.mkdir("triton")
    done = stub.run(tmp_path_factory.mktemp("stub"), "planted", cache=cache)
    return dict(line.split("\t") for line in done.stdout.splitlines())


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_refused(fault, said):
    assert FAULTS[fault] in said[fault]


def test_without_a_fault_it_launches(said):
    assert said.keys() == {"nothing", *FAULTS}
    assert said["nothing"] == "launched"
