"""Tiles that this machine's compiler cannot keep in registers: the next candidate serves.

    spills.json   {identity of device and versions: {"extended in float32: block_m 64 ...": bytes}}

Which tile spills is a matter of a few registers and changes with the version of Triton and of
ptxas, so no list of tiles holds for long. Every launcher hands over what it compiled, and each
compiled kernel is looked at once; a tile whose registers went to memory is passed over from then
on. The checks of first use are the first to launch: a kernel that spills, or that asks for more
than the chip has, is known before it would serve.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_lora import disk, env
from fused_lora.kernels.gemm import is_tf32
from fused_lora.kernels.triton.available import identity

FORMAT = "spills 1"
TOO_LARGE = 1 << 20  # bytes, of a tile that does not fit at all
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
LOCAL_LOAD = re.compile(r"\bLDL\b")

_seen: set[Any] = set()  # compiled kernels
_known: dict[torch.device, dict[str, int]] = {}  # bytes by name
_forgetful: list[Callable[[], None]] = []  # caches of tiles chosen before


def seen(compiled: object) -> bool:
    """Whether there is nothing to look at: an interpreter's None, or a kernel that was seen."""
    return compiled is None or compiled in _seen


def look(compiled: Any, kernel: str, tile: Any, like: Tensor) -> None:
    """Remember ``kernel`` in ``tile`` if what was compiled for it, and for ``like``, spills."""
    _seen.add(compiled)
    if not getattr(compiled, "n_spills", 0):  # which a kernel has once it is loaded
        return
    if taken := usage(compiled.asm["cubin"])[1]:
        remember(kernel, tile, precision(like.dtype), like.device, taken)


def remember(kernel: str, tile: Any, rounds: str, device: torch.device, taken: int) -> None:
    """Pass over ``tile`` from now on, in later processes too; ``rounds`` as ``precision`` says."""
    known = _of(device)
    name = called(kernel, tile, rounds)
    known[name] = max(taken, known.get(name, 0))
    here = _key(device)
    kept = disk.read(path()).get(here)
    disk.merge(path(), {here: (kept if isinstance(kept, dict) else {}) | known})
    for forget in _forgetful:
        forget()


def choose(kernel: str, tiles: Sequence[Any], rounds: str, device: torch.device) -> Any:
    """The first of ``tiles`` that is not known to spill; of those that all do, the least."""
    known = _of(device)
    if not known:
        return tiles[0]
    return min(tiles, key=lambda tile: known.get(called(kernel, tile, rounds), 0))


def passed_over(device: torch.device) -> dict[str, str]:
    """What is passed over on ``device``, each with a reason."""
    return {
        name: "it does not fit the chip"
        if taken >= TOO_LARGE
        else f"{taken} bytes of spilled registers"
        for name, taken in sorted(_of(device).items())
    }


def called(kernel: str, tile: Any, rounds: str) -> str:
    """What a tile is remembered under."""
    sizes = " ".join(f"{name} {value}" for name, value in vars(tile).items())
    return f"{kernel} in {rounds}: {sizes}"


def precision(dtype: torch.dtype) -> str:
    """What products of ``dtype`` round to: its name, or tf32."""
    return "tf32" if is_tf32(dtype) else str(dtype).removeprefix("torch.")


def path() -> Path:
    """The file of tiles passed over."""
    return env.cache_dir() / "spills.json"


def forget() -> None:
    """Drop what this process remembers; the disk is left alone."""
    _known.clear()
    _seen.clear()
    for each in _forgetful:
        each()


def refresh(device: torch.device) -> None:
    """Hear of what another process of this machine remembered."""
    before = _known.pop(device, None)
    if before is None or _of(device) != before:
        for each in _forgetful:
            each()


def heeded_by(cached: Callable[[], None]) -> None:
    """``cached`` is called where a tile is passed over that it may have chosen."""
    _forgetful.append(cached)


def _of(device: torch.device) -> dict[str, int]:
    if device not in _known:
        kept = disk.read(path()).get(_key(device))
        rows = kept.items() if isinstance(kept, dict) else ()
        _known[device] = {name: taken for name, taken in rows if isinstance(taken, int)}
    return _known[device]


def _key(device: torch.device) -> str:
    return f"{FORMAT}|{identity(device)}"


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes spilled, read off the machine code.

    For bulk copies on sm_120, ptxas 12.9 keeps a frame of 8 bytes that it writes zeros to and never
    reads, and counts no spill: a frame is one where the code loads from it.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _cuobjdump("-res-usage", file.name)
        match = RESOURCES.search(text)
        assert match, text
        registers, stack, local = map(int, match.groups())
        reads = stack + local and LOCAL_LOAD.search(_cuobjdump("-sass", file.name))
    return registers, stack + local if reads else 0


def _cuobjdump(*arguments: str) -> str:
    command = [str(_tools() / "cuobjdump"), *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout + done.stderr


@lru_cache(maxsize=1)
def _tools() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
