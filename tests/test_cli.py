"""fused-lora env."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from fused_lora import cli, env
from fused_lora.kernels.cuda import native
from fused_lora.kernels.triton import available
from fused_lora.version import __version__


def test_env_prints_everything(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSED_LORA_CACHE_DIR", "somewhere")
    assert cli.main(["env"]) == 0
    printed = capsys.readouterr().out
    for name, meaning in env.VARIABLES.items():
        assert f"{name} " in printed and meaning in printed
    assert torch.__version__ in printed
    assert "somewhere" in printed
    assert (available.why_not() or cli.TRITON) in printed


def test_env_says_why_the_compiled_module_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_LORA_DISABLE_NATIVE", "1")
    assert dict(cli.environment()["backends"])["cuda"] == "FUSED_LORA_DISABLE_NATIVE is set"
    monkeypatch.setattr(native, "why_not", lambda: None)
    assert dict(cli.environment()["backends"])["cuda"] == cli.CUDA


def test_env_says_which_kernels_are_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load", lambda: SimpleNamespace(archs="80-real,90-real"))
    said = dict(cli.environment()["backends"])
    assert said["compiled for"] == "80-real, 90-real"
    assert said["cuda lora_linear"] == "compiled without sm_90a: empty, and not used"
    monkeypatch.setattr(native, "load", lambda: SimpleNamespace(archs="80-real,90a-real"))
    assert "cuda lora_linear" not in dict(cli.environment()["backends"])


def test_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "fused_lora.cli", "--version"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert printed.strip() == __version__


def test_no_command_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main([])
    assert "command" in capsys.readouterr().err


def test_explain(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["explain", "vit_tiny_patch16_224", "--rank", "4", "--qkv", "joint"]
    assert cli.main([*arguments, "--batch-size", "2"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("chosen") == 4
    assert "M 394  K 192  N 576  rank 4  float32" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "no_such_model"], "Unknown model"),
        (["explain", "vit_tiny_patch16_224", "--rank", "193"], "rank 193 is above"),
        (["explain", "vit_tiny_patch16_224", "--dtype", "fp33"], "got 'fp33'"),
        (["explain", "vit_tiny_patch16_224", "--dtype", "int8"], "got torch.int8"),
        (["explain", "vit_tiny_patch16_224", "--batch-size", "0"], "batch_size must be"),
        (["explain", "vit_tiny_patch16_224", "--qkv", "both"], "qkv must be one of"),
        (["explain", "vit_tiny_patch16_224", "--device", "tpu9"], "tpu9"),
    ],
)
def test_explain_refuses(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_unknown_words_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["env", "--colour"])
    assert "unrecognized arguments: --colour" in capsys.readouterr().err
