"""TORCH_CUDA_ARCH_LIST as torch spells it, and the choice of whether to compile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from build_support import here
from build_support.archs import DEFAULT, cmake_archs, known_to

cmake_build = pytest.importorskip("build_support.cmake_build", reason="setuptools is not installed")


@pytest.mark.parametrize(
    "torch_list, entries",
    [
        ("8.0", ["80-real"]),
        ("8.0;8.6+PTX", ["80-real", "86-real", "86-virtual"]),
        ("8.0, 9.0a 10.0f", ["80-real", "90a-real", "100f-real"]),
        ("Hopper", ["90a-real", "90-virtual"]),
        ("9.0", ["90a-real"]),
        ("9.0;9.0a 10.0", ["90a-real", "100a-real"]),
        ("9.0+PTX", ["90a-real", "90-virtual"]),
        ("9.0a+PTX", ["90a-real", "90a-virtual"]),
        ("10.3", ["103-real"]),
        ("Ampere;8.0", ["80-real", "86-real", "86-virtual"]),
        ("12.1", ["121-real"]),
        (DEFAULT, ["80-real", "86-real", "89-real", "90a-real", "100a-real", "120-real"]),
    ],
)
def test_lists(torch_list: str, entries: list[str]) -> None:
    assert cmake_archs(torch_list) == entries


@pytest.mark.parametrize("word", ["sm_80", "8", "80", "hopper", "8.0+ptx", "7.5", ";", "all"])
def test_nonsense_is_named(word: str) -> None:
    with pytest.raises(ValueError, match="TORCH_CUDA_ARCH_LIST"):
        cmake_archs(word)


def test_an_old_compiler_drops_what_it_does_not_know() -> None:
    assert known_to("compute_80\ncompute_90\n", cmake_archs(DEFAULT)) == ["80-real", "90a-real"]


@pytest.fixture
def no_nvcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))


def test_native_0_skips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_LORA_NATIVE", "0")
    assert cmake_build.native_extensions() == []


def test_without_nvcc(
    monkeypatch: pytest.MonkeyPatch, no_nvcc: None, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("FUSED_LORA_NATIVE", raising=False)
    assert cmake_build.native_extensions() == []
    assert "nvcc is not in CUDA_HOME" in capsys.readouterr().err
    monkeypatch.setenv("FUSED_LORA_NATIVE", "1")
    with pytest.raises(SystemExit, match="nvcc"):
        cmake_build.native_extensions()


def test_with_nvcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch(mode=0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    for asked, optional in {"": True, "1": False}.items():
        monkeypatch.setenv("FUSED_LORA_NATIVE", asked)
        (extension,) = cmake_build.native_extensions()
        assert extension.optional is optional


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """An nvcc that knows every architecture, and an nvidia-smi that lists what is asked for."""
    (tmp_path / "bin").mkdir()

    def tool(name: str, said: str) -> None:
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/sh\nprintf '{said}'\n")
        path.chmod(0o755)

    tool("nvcc", "compute_80\\ncompute_89\\ncompute_90\\ncompute_100\\ncompute_120\\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("FUSED_LORA_NATIVE", "here")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    return lambda *capabilities: tool("nvidia-smi", "\\n".join(capabilities))


def test_native_here_builds_for_the_gpus_that_are_here(machine, monkeypatch) -> None:
    machine("9.0", "9.0", "8.9")
    assert here.gpus() == ["9.0", "8.9"] and "9.0;8.9 alone" in here.text()
    (extension,) = cmake_build.native_extensions()
    assert extension.optional
    assert cmake_build.wanted_archs("nvcc") == ["90a-real", "89-real"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert cmake_build.wanted_archs("nvcc") == ["80-real"] and "for 8.0" in here.text()


def test_native_here_builds_nothing_where_no_gpu_is(machine, monkeypatch, capsys) -> None:
    machine()
    assert cmake_build.native_extensions() == [] and "lists no GPU" in capsys.readouterr().err
    assert "not built, since" in here.text()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")
    assert len(cmake_build.native_extensions()) == 1
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    monkeypatch.setenv("FUSED_LORA_NATIVE", "1")
    assert cmake_build.wanted_archs("nvcc")[0] == "80-real"  # for every architecture


def test_a_machine_without_nvidia_smi_has_no_gpu(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert here.gpus() == []


def test_native_takes_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_LORA_NATIVE", "yes")
    with pytest.raises(SystemExit, match="yes"):
        cmake_build.native_extensions()
