"""fused-lora selftest: what it lists, what it prints, and its exit status."""

import json

import pytest
import torch

from fused_lora import cli
from fused_lora.types import Backend, Needs, Span
from fused_lora.verify import kernel_registry, own_process, selftest, verdicts

CPU = torch.device("cpu")
ELEMENTWISE = {
    *(
        "extended_gelu",
        "extended_grads",
        "extended_grads_tanh",
        "gelu_grads",
        "gelu_grads_tanh",
        "pack_grads",
        "extended_scale",
        "extended_dropout",
        "shrink_dropout",
        "grad_dropout",
    ),
    *(
        "shrink_norm",
        "shrink_gelu",
        "expand_norm",
        "expand_residual",
        "extended_wide",
        "one_pass_scale",
        "one_pass_wide",
        "layer_norm",
        "gelu",
        "border_weight",
        "merge_many",
        "extended_fp8",
        "quantise",
    ),
}
COMPILED = {
    *("lora_merge", "lora_grad", "lora_grad_gelu", "lora_grad_norm"),
    *("lora_linear", "lora_linear_gelu", "lora_linear_scale"),
}
KERNELS = {"shrink", "extended", "one_pass", "grad", "merge"} | ELEMENTWISE


def test_without_a_device_it_says_why_and_shows_what_it_would_run(capsys, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    path = tmp_path / "rows.jsonl"
    assert cli.main(["selftest", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "nothing can run here: " in printed.splitlines()[-1]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["kernel"] for row in rows} == KERNELS | COMPILED
    assert {row["dtype"] for row in rows} == {"float32", "tf32", "bfloat16", "float16"}
    assert {row["verdict"] for row in rows} == {"not run"}
    assert len(printed.splitlines()) == len(rows) + 1


def test_what_holds_every_rank_in_one_tile_is_checked_with_as_many():
    found = {}
    for launch in kernel_registry.epilogues(torch.bfloat16, CPU):
        if launch.kernel in kernel_registry.HOLD_RANKS:
            shapes = kernel_registry.of_launch(launch, "bfloat16").shapes
            most = max(sum(span.rank for span in shape.spans) for shape in shapes)
            assert most == launch.tile.block_r, launch
            found.setdefault(launch.kernel, set()).add(most)
    assert found == {name: {16, 32, 64} for name in kernel_registry.HOLD_RANKS}


@pytest.mark.usefixtures("few")
def test_all_right(kernels, capsys):
    assert cli.main(["selftest", "--dtype", "bfloat16"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert all(line.startswith("  passed ") for line in lines if " triton " in line)
    assert " passed, 7 not run in " in last
    assert all(kernels.runs.values())


@pytest.fixture
def few(monkeypatch):
    """One class or two of each kernel."""
    monkeypatch.setattr(kernel_registry, "WIDTHS", (192,))
    monkeypatch.setattr(kernel_registry, "RANKS", (16,))


@pytest.mark.usefixtures("few")
def test_several_processes_check_at_once_and_rows_come_one_by_one(kernels, monkeypatch, tmp_path):
    path, asked, rows = tmp_path / "rows.jsonl", set(), []
    monkeypatch.setattr(own_process, "serves", lambda checked, device: True)

    def check(checked, device, worker):
        asked.add(worker)
        rows.append(len(path.read_text().splitlines()))
        return checked.check(device)

    monkeypatch.setattr(own_process, "check", check)
    arguments = ["--dtype", "bfloat16", "--backend", "triton", "--processes", "3"]
    assert cli.main(["selftest", *arguments, "--json", str(path)]) == 0
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["backend"] for row in found} == {"triton"}
    assert {row["verdict"] for row in found} == {"passed"} and len(found) == len(rows)
    assert len(asked) == 3 and max(rows) > 0  # the first were written before the last were found


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("name", ["shrink", "extended", "merge", "layer_norm", "extended_gelu"])
def test_one_wrong_kernel_is_an_exit_status(kernels, capsys, name, tmp_path):
    kernels.faults[name] = torch.zeros_like
    path = tmp_path / "rows.jsonl"
    assert cli.main(["selftest", "--dtype", "float32,tf32", "--json", str(path)]) == 1
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    failed = {row["kernel"] for row in rows if row["verdict"] == "FAILED"}
    assert failed == {name}
    wrong = next(row for row in rows if row["verdict"] == "FAILED")
    assert float(wrong["error"]) > float(wrong["budget"]) > 0
    assert "is over the budget" in wrong["reason"] and wrong["reason"] in capsys.readouterr().out


@pytest.mark.usefixtures("few")
def test_it_checks_anew_and_its_verdicts_hold(kernels):
    (first, *_) = selftest.selftest(dtypes=["bfloat16"])
    ran = kernels.runs["shrink"]
    kernels.faults["shrink"] = torch.zeros_like
    (second, *_) = selftest.selftest(dtypes=["bfloat16"])
    assert kernels.runs["shrink"] == 2 * ran
    assert (first.word, second.word) == ("passed", "FAILED")
    assert verdicts.load(second.subject, CPU) == second.verdict


def test_what_a_plan_asks_for_is_among_what_is_checked(kernels, monkeypatch):
    """On an H200 and a smaller chip: no tile of a plan escapes the self-test."""
    from fused_lora.kernels.triton import launches as module
    from fused_lora.kernels.triton import tiles
    from fused_lora.ops.planning import problem
    from fused_lora.plan.strategies import candidates

    for arch, count in ((90, 132), (120, 48)):
        monkeypatch.setattr(tiles, "architecture", lambda device, arch=arch: arch)
        monkeypatch.setattr(kernel_registry, "architecture", lambda device, arch=arch: arch)
        monkeypatch.setattr(tiles, "multiprocessors", lambda device, count=count: count)
        tiles.thin_tile.cache_clear()
        for dtype in (torch.bfloat16, torch.float32):
            known = set(kernel_registry.launches(dtype, CPU))
            for m, n, rank in ((197, 384, 4), (25216, 2304, 16), (50432, 3072, 512)):
                question = problem(m, 768, n, (Span(0, n, rank),), dtype, True, Needs())
                for plan in candidates(question, [Backend.TRITON]):
                    module.tile_of.cache_clear()
                    assert module.launches(question, plan, dtype, CPU) <= known
    tiles.thin_tile.cache_clear()
    module.tile_of.cache_clear()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "fp8"], "dtypes must be of"),
        (["--device", "abacus"], "abacus"),
        (["--backend", "rocm"], "backends must be of ('triton', 'cuda'), got ['rocm']"),
        (["--processes", "0"], "processes must be 1 or more, got 0"),
        (["--json", "no/such/folder/x.json"], "no folder 'no/such/folder'"),
    ],
)
def test_wrong_words_are_named(arguments, message, capsys):
    assert cli.main(["selftest", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("few")
def test_a_full_memory_is_not_a_failure(kernels, capsys):
    def full(t):
        raise torch.OutOfMemoryError("CUDA out of memory")

    kernels.faults["shrink"] = full
    assert cli.main(["selftest", "--dtype", "bfloat16"]) == 0
    assert "no memory is left" in capsys.readouterr().out


@pytest.mark.usefixtures("few")
def test_the_products_setting_is_put_back(kernels):
    before = torch.backends.cuda.matmul.fp32_precision
    selftest.selftest(dtypes=["tf32"])
    assert torch.backends.cuda.matmul.fp32_precision == before


@pytest.mark.gpu
def test_every_kernel_of_this_device_passes(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSED_LORA_CACHE_DIR", str(tmp_path))
    results = selftest.selftest(dtypes=["bfloat16", "float32"])
    assert not [str(result) for result in results if result.word == "FAILED"]
    assert any(result.word == "passed" for result in results)
