"""The command line of ``fused-lora bench``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fused_lora.bench.registry import JOBS, METHODS, SUITES
from fused_lora.bench.shapes import CACHES, DTYPES, MODES, SHAPES, Grid, grid

EPILOG = "Lists are separated by commas. Without options the grid suits the device."


def _listed(kind: str, known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        for name in names:
            if name not in known:
                hint = ", ".join(known)
                raise argparse.ArgumentTypeError(f"unknown {kind} {name!r}; known: {hint}")
        return names

    return parse


def positive(text: str) -> tuple[int, ...]:
    numbers = []
    for word in text.split(","):
        if not word.strip().isdecimal() or int(word) == 0:
            raise argparse.ArgumentTypeError(f"{word!r} is not a positive whole number")
        numbers.append(int(word))
    return tuple(numbers)


def seconds_of(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return seconds


def _device(text: str) -> str:
    try:
        kind = torch.device(text).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is not cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"{text!r}: torch sees no GPU here")
    return text


def parser() -> argparse.ArgumentParser:
    """The parser; every wrong value is named in its error."""
    made = argparse.ArgumentParser(
        prog="fused-lora bench",
        description="Time training steps beside the frozen network, naive LoRA and PEFT.",
        epilog=EPILOG,
    )
    add = made.add_argument
    add("--suite", choices=[*SUITES, *JOBS], default="train_step")
    add("--models", type=_listed("model", list(SHAPES)), metavar="NAMES", help="timm names")
    add("--ranks", type=positive, metavar="LIST")
    add("--batch", type=positive, metavar="LIST", help="images of one step")
    add("--dtype", type=_listed("dtype", DTYPES), metavar="NAMES", help="fp32, bf16, amp")
    add("--mode", type=_listed("mode", MODES), metavar="NAMES", help="eager, graph")
    add("--cache", type=_listed("cache", CACHES), metavar="NAMES", help="warm, cold: a GPU's L2")
    names = _listed("method", list(METHODS))
    add("--methods", type=names, metavar="NAMES")
    add("--contenders", type=names, dest="methods", help=argparse.SUPPRESS)  # in 0.1
    add("--budget-seconds", type=seconds_of, metavar="S", help="in all; rounds are at least 3")
    add("--saved-tensors", action="store_true", help="saved_bytes: also which operation keeps what")
    add("--ledger", action="store_true", dest="saved_tensors", help=argparse.SUPPRESS)  # in 0.1
    add("--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, default=Path("report.html"), help="the report (report.html)")
    add("--prepare", action="store_true", help="compile, check and time for it; no rows")
    add("--verbose", action="store_true", help="where the time of each case goes")
    add("--rows", type=Path, metavar="FOLDER", help="also append rows as JSON lines below it")
    add("--readme", type=Path, metavar="FILE", help="only rewrite its tables from --rows")
    return made


def chosen(options: argparse.Namespace) -> Grid:
    """The default grid of suite and device, with what the command line says in its place.

    Raises:
        ValueError: a graph or a cold cache where there is none.
    """
    beyond = {*(options.mode or ()), *(options.cache or ())} & {"graph", "cold"}
    if beyond and not options.device.startswith("cuda"):
        raise ValueError(f"{', '.join(sorted(beyond))}: a GPU's, got --device {options.device}")
    if "graph" in beyond and options.suite != "six_projections":
        raise ValueError(f"only six_projections is recorded as a graph, not {options.suite}")
    terms = {
        "models": options.models,
        "ranks": options.ranks,
        "batches": options.batch,
        "one_image": () if options.batch else None,
        "one_rank": () if options.ranks else None,
        "dtypes": options.dtype,
        "methods": options.methods,
        "modes": options.mode,
        "caches": options.cache,
        "budget_s": options.budget_seconds,
    }
    found = grid(options.suite, options.device)
    return replace(found, **{name: value for name, value in terms.items() if value is not None})
