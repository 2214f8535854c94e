"""Images a second of WeCoLoRA's and SLAD's steps: this library, naive LoRA, PEFT, one trainer.

    PHOTOGRAPHS=photographs.tar.gz python recipes/throughput.py recipes/results/throughput.json

Every way runs the same ``Fit`` on the same batch of photographs, adapters of one rank on all six
projections; what differs is who computes them. Times are of this process alone (CPU) or of the
clock (CUDA), taken in turns; ratios are medians over rounds. PEFT has one adapter on a fused qkv,
the others three. SLAD's student shares its teacher's adapters here, and has its own there. The last
rows are whole pipelines: the seconds of all their phases for as many steps each.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch as substituted

import torch
from grid import begin
from safetensors.torch import save_file

import fused_lora.bench.methods  # noqa: F401  registers them
from fused_lora.bench.clock import Times, interleave
from fused_lora.bench.methods import Naive, Peft
from fused_lora.bench.saved_tensors import SavedBytes, step_peak_bytes
from fused_lora.distill import blocks, copy_layers
from fused_lora.distill.blocks import blocks_of
from fused_lora.distill.data.batches import loaded
from fused_lora.distill.models import build
from fused_lora.distill.recipe.read import of
from fused_lora.distill.recipe.tables import Teacher
from fused_lora.distill.run import Run
from fused_lora.distill.slad_run import SladRun
from fused_lora.distill.train.devices import World
from fused_lora.distill.train.fit import Fit
from fused_lora.patching.patch import unpatch

BASELINES = {"naive": Naive, "PEFT": Peft}
SMALL = {"embed_dim": 64, "depth": 6, "num_heads": 2}
WIDE = {"embed_dim": 96, "depth": 12, "num_heads": 3}
PHOTOS = {"img_size": 32, "patch_size": 4, "mlp_ratio": 2.0, "num_classes": 10}
STEP = 50  # of the schedule: any


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="the JSON file")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--budget", type=float, default=60, help="seconds for each table")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    result = begin({"rank": args.rank, "batch": args.batch, "device": args.device})
    del result["sweep"]
    with TemporaryDirectory() as folder:
        home = Path(folder)
        for name, ways in (("WeCoLoRA", wecolora(home, args)), ("SLAD, joint", slad(home, args))):
            result["rows"] += rows(name, ways, args)
        result["rows"] += pipelines(home, args)
    args.out.write_text(json.dumps(result).replace("}, {", "},\n{") + "\n")
    for row in result["rows"]:
        print(row)


class Way:
    """One fit with its batch, and what it runs within."""

    def __init__(self, fit: Fit, names: dict[int, list[str]] | None = None) -> None:
        self.fit, self.names = fit, names or {}
        (self.micro,) = loaded(fit.data, fit.order, range(1))
        fit.module.train()

    def inside(self) -> Any:
        """The models' blocks stay known where a baseline hides their linears."""
        if not self.names:
            return nullcontext()
        return substituted.object(blocks, "_names", lambda model: self.names[id(model)])

    def step(self) -> None:
        """One step of the trainer."""
        with self.inside():
            self.fit._step(STEP, self.micro)
        self.fit._unseen.clear()

    def kept(self) -> int:
        """Bytes that one forward keeps for its backward, weights and images apart."""
        batch = self.micro[0].to(self.fit.precision.device, self.fit.precision.stored)
        with self.inside(), SavedBytes(self.fit.objective, [batch.images]) as saved:
            self.fit._micro_step(batch, last=True)
        self.fit.optimizer.zero_grad(set_to_none=True)
        return saved.total


class ProcessClock:
    """Seconds of this process: another one's turn on the core does not count."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.now: Callable[[], float] = time.process_time if device == "cpu" else time.perf_counter

    def measure_ms(self, step: Callable[[], None]) -> float:
        """The duration of one step."""
        begun_s = self.now()
        step()
        if self.device != "cpu":
            torch.cuda.synchronize()
        return 1e3 * (self.now() - begun_s)


def rows(name: str, ways: dict[str, Way], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each way of a step."""
    kept = {key: way.kept() for key, way in ways.items()}
    peaks = {key: step_peak_bytes(way.step, args.device) for key, way in ways.items()}
    times = timed({key: way.step for key, way in ways.items()}, args)
    return [
        {
            "step": name,
            "way": key,
            "images_per_s": round(1e3 * args.batch / each.median_ms, 1),
            "over_naive": round(each.over(times["naive"]), 3),
            "kept_bytes": kept[key],
            "peak_bytes": peaks[key],
            "rounds": len(each.samples_ms),
        }
        for key, each in times.items()
    ]


def timed(steps: dict[str, Callable[[], None]], args: argparse.Namespace) -> dict[str, Times]:
    """In turns."""
    return interleave(steps, ProcessClock(args.device), args.budget, warmup=3)


def recipe(home: Path, args: argparse.Namespace, **tables: Any) -> Any:
    """A recipe on the photographs, from weights that are written here."""
    given: dict[str, Any] = {
        "teacher": weights(home, "teacher", WIDE),
        "student": {"reduction": 2, "rank": args.rank, "targets": list(SIX)},
        "data": {"source": "folder", "path": "$PHOTOGRAPHS", "fraction": 0.1},
        "train": {"steps": 100, "batch_size": args.batch, "device": args.device, "blr": 1e-3},
    }
    return of(given | tables)


SIX = ("q", "k", "v", "out", "fc1", "fc2")


def weights(home: Path, name: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """The table of a model of seeded weights."""
    table = {"model": "vit_tiny_patch16_224", "options": PHOTOS | sizes}
    path = home / f"{name}.safetensors"
    if not path.is_file():
        torch.manual_seed(0)
        save_file(dict(build(Teacher(**table)).state_dict()), str(path))
    return table | {"checkpoint": str(path)}


def wecolora(home: Path, args: argparse.Namespace) -> dict[str, Way]:
    """The step of WeCoLoRA at reduction 2."""
    found = {}
    for key in ("fused", *BASELINES):
        run = Run(recipe(home, args), home / "runs", World())
        student = run._student()
        if key in BASELINES:
            student = copy_layers(run.teacher, 2)
            BASELINES[key]().install(student, args.rank)
            student.to(run.precision.device)
        objective = run._objective(student)
        found[key] = Way(run._fit(objective, run.chosen(), None))  # type: ignore[arg-type]
    return found


def slad(home: Path, args: argparse.Namespace) -> dict[str, Way]:
    """The joint step of SLAD: shared adapters; each model its own, by the baselines."""
    found = {}
    for key in ("fused", *BASELINES):
        run = slad_run(home, args, "joint" if key == "fused" else "two_step")
        names = {}
        if key in BASELINES:
            for model in (run.both.teacher, run.both.student):
                unpatch(model)
                names[id(model)] = [block.name for block in blocks_of(model)]
                model.requires_grad_(False)
                BASELINES[key]().install(model, args.rank)
                model.to(run.precision.device)
            run.phases = slad_run(home, args, "joint").phases
            run.trains = [p for p in run.both.parameters() if p.requires_grad]
        found[key] = Way(phase(run, 0), names)
    return found


def slad_run(home: Path, args: argparse.Namespace, method: str) -> SladRun:
    """A run whose models are ready to train."""
    table = weights(home, "student", SMALL) | {"method": method}
    run = SladRun(recipe(home, args, method="slad", slad=table), home / "runs", World())
    run._student()
    return run


def phase(run: SladRun, number: int) -> Fit:
    """The fit of one phase."""
    return run._fit(run._entered(number), run.chosen(), None)  # type: ignore[arg-type]


def pipelines(home: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds a step of every phase of a pipeline together, and how many times the joint one's."""
    steps: dict[str, Callable[[], None]] = {}
    for method in ("joint", "two_step", "probe", "finetune"):
        for number in range(1 if method == "joint" else 2):
            run = slad_run(home, args, method)
            steps[f"{method} {number + 1}"] = Way(phase(run, number)).step
    times = timed(steps, args)
    samples: dict[str, list[float]] = {}
    for key, each in times.items():
        method = key.rpartition(" ")[0]
        before = samples.get(method, [0.0] * len(each.samples_ms))
        samples[method] = [a + b for a, b in zip(before, each.samples_ms, strict=True)]
    whole = {method: Times(tuple(values)) for method, values in samples.items()}
    return [
        {
            "pipeline": method,
            "ms_per_step_of_all_phases": round(each.median_ms, 2),
            "over_joint": round(each.over(whole["joint"]), 3),
            "rounds": len(each.samples_ms),
        }
        for method, each in whole.items()
    ]


if __name__ == "__main__":
    main()
