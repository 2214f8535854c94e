"""Ceilings: the table of known GPUs, and the file that keeps measured ones."""

import json
import threading

import pytest

from fused_lora.plan.problem import Ceilings, known, load, store, unmeasured

MEASURED = Ceilings("a box", "float32", 100.0, 8.0, 20.0, 3.0, True)


@pytest.mark.parametrize(
    ("name", "gflops"),
    [
        ("NVIDIA H200", 790_000),
        ("NVIDIA H100 80GB HBM3", 790_000),
        ("NVIDIA H100 PCIe", 600_000),
        ("NVIDIA A100-SXM4-80GB", 250_000),
        ("NVIDIA A10G", None),
        ("NVIDIA A10", 100_000),
        ("NVIDIA L4", 97_000),
        ("NVIDIA L40S", 290_000),
        ("NVIDIA GeForce RTX 4090", 132_000),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Some Other GPU", None),
    ],
)
def test_known_gpus_by_name(name, gflops):
    found = known(name, "bfloat16")
    assert (found and found.matmul_gflops) == gflops
    assert found is None or not found.measured


def test_round_trip(tmp_path):
    store(tmp_path / "new", "a", MEASURED)
    store(tmp_path / "new", "b", unmeasured("another", "float32"))
    assert load(tmp_path / "new", "a") == MEASURED
    assert load(tmp_path / "new", "b").name == "another"
    assert load(tmp_path / "new", "c") is None


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"a": 3}', '{"a": {"name": "x"}}',
     json.dumps({"a": {**MEASURED.__dict__, "matmul_gflops": 0}}),
     json.dumps({"a": {**MEASURED.__dict__, "matmul_gflops": "fast"}}),
     json.dumps({"a": {**MEASURED.__dict__, "call_us": float("nan")}}),
     json.dumps({"a": {**MEASURED.__dict__, "older": 1}})],
)  # fmt: skip
def test_torn_and_stale_files_are_ignored_and_replaced(tmp_path, text):
    (tmp_path / "ceilings.json").write_text(text)
    assert load(tmp_path, "a") is None
    store(tmp_path, "a", MEASURED)
    assert load(tmp_path, "a") == MEASURED


def test_a_folder_that_cannot_be_written_is_passed_over(tmp_path):
    (tmp_path / "file").write_text("")
    store(tmp_path / "file", "a", MEASURED)
    assert load(tmp_path / "file", "a") is None


def test_concurrent_writers_leave_a_whole_file(tmp_path):
    threads = [threading.Thread(target=store, args=(tmp_path, str(i), MEASURED)) for i in range(16)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    rows = json.loads((tmp_path / "ceilings.json").read_text())
    assert rows
    assert all(load(tmp_path, key) == MEASURED for key in rows)
    assert list(tmp_path.iterdir()) == [tmp_path / "ceilings.json"]
