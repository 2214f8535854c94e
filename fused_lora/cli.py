"""The fused-lora command: one function per subcommand, each with its arguments beside it."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from itertools import product
from pathlib import Path

import torch

from fused_lora import env
from fused_lora.arguments import whole
from fused_lora.kernels.cuda import native
from fused_lora.kernels.triton import available
from fused_lora.patching.explain import explain, explain_program
from fused_lora.patching.patch import patch
from fused_lora.patching.prepare import prepare
from fused_lora.version import __version__

TRITON = "serves lora_linear, merges, dropout, norms and GELU, each after this device checked it"
CUDA = (
    "serves adapter gradients, lora_merge and, where asked on sm_90, lora_linear, "
    "each kernel after this device has checked it"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; its exit status."""
    parser = argparse.ArgumentParser(prog="fused-lora", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command")
    adds = (_add_env, _add_explain, _add_prepare, _add_selftest, _add_tune, _add_distill)
    for add in (*adds, _add_bench):
        add(commands)
    args, rest = parser.parse_known_args(argv)
    if rest and args.run not in (_run_bench, _run_tune):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    try:
        return args.run(args)
    except (ValueError, RuntimeError) as error:
        print(f"fused-lora: {error}", file=sys.stderr)
        return 2


def _add_env(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("env", help="versions, devices, backends and variables")
    command.set_defaults(run=_run_env)


def _run_env(args: argparse.Namespace) -> int:
    found = environment()
    width = 2 + max(len(name) for rows in found.values() for name, _ in rows)
    for title, rows in found.items():
        print(title)
        for name, value in rows:
            print(f"  {name:<{width}}{value}")
    return 0


def _add_explain(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("explain", help="what computes each projection, and why")
    command.add_argument("model", help="a timm model, such as vit_base_patch16_224")
    command.add_argument("--rank", type=int, default=16, help="of every adapter (16)")
    command.add_argument("--batch-size", type=int, default=8, help="images per step (8)")
    command.add_argument(
        "--qkv", default="separate", help="adapters of a fused qkv: separate, joint"
    )
    command.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    command.add_argument("--device", default="cpu", help="whose ceilings to plan against (cpu)")
    command.add_argument(
        "--program",
        metavar="MODULE",
        help="the calls of one module's program in order, such as blocks.0.mlp; runs it here once",
    )
    command.add_argument("--measure", action="store_true", help="with --program: time each call")
    command.set_defaults(run=_run_explain)


def _run_explain(args: argparse.Namespace) -> int:
    try:
        import timm
    except ImportError:
        raise RuntimeError("explain builds the model with timm: pip install timm") from None
    dtype = getattr(torch, args.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"--dtype must be float32, bfloat16 or float16, got {args.dtype!r}")
    if args.measure and not args.program:
        raise ValueError("--measure times the calls of one --program MODULE")
    with torch.device(args.device if args.program else "meta"):
        model = timm.create_model(args.model, pretrained=False)
    patch(model, args.rank, qkv=args.qkv)
    if args.program:
        model = model.to(dtype)
        print(explain_program(model, args.program, args.batch_size, measure=args.measure))
        return 0
    print(explain(model, args.batch_size, dtype=dtype, device=args.device))
    return 0


def _add_prepare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "prepare",
        help="compile, check and time now what a first training step would",
        description="Compile, check and time, in many processes, what the first training step of a "
        "timm model with adapters would on this device. Everything is kept as it comes.",
    )
    add = command.add_argument
    add("model", help="a timm model, such as vit_base_patch16_224")
    add("--rank", default="16", metavar="LIST", help="of every adapter, by commas (16)")
    add("--batch-size", type=int, default=8, help="images per step (8)")
    add("--qkv", default="separate", help="adapters of a fused qkv: separate, joint")
    add("--level", default="block,linear", metavar="LIST", help="of fusing, by commas (both)")
    add("--dtype", default="bfloat16", help="float32, bfloat16, float16, or amp: autocast (bf16)")
    add("--device", help="cuda, cuda:1, cpu, ... (the current GPU, else the CPU)")
    add("--processes", type=int, help="at once (one a processor, at most 16)")
    command.set_defaults(run=_run_prepare)


def _run_prepare(args: argparse.Namespace) -> int:
    try:
        import timm
    except ImportError:
        raise RuntimeError("prepare builds the model with timm: pip install timm") from None
    dtype = torch.float32 if args.dtype == "amp" else getattr(torch, args.dtype, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"--dtype must be float32, bfloat16, float16 or amp, got {args.dtype!r}")
    whole("--batch-size", args.batch_size)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    ranks, levels = args.rank.split(","), args.level.split(",")
    if not all(rank.isdecimal() for rank in ranks):
        raise ValueError(f"--rank must be whole numbers by commas, got {args.rank!r}")
    for rank, level in product(map(int, ranks), levels):
        with device:
            model = timm.create_model(args.model, pretrained=False)
        patch(model, rank, qkv=args.qkv, level=level, batch_size=args.batch_size)
        model = model.to(dtype).train()
        size: tuple[int, ...] = model.pretrained_cfg["input_size"]  # type: ignore[index,assignment]
        x = torch.randn(args.batch_size, *size, device=device, dtype=dtype)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "amp"):
            found = prepare(model, x, processes=args.processes)
        print(f"{args.model}, rank {rank}, {level} level, {args.dtype}: {found}", flush=True)
    return 0


def _add_distill(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("distill", help="train a student from a recipe")
    command.add_argument("recipe", help="a TOML file, such as recipes/digits_wecolora.toml")
    command.add_argument(
        "--set",
        nargs="+",
        default=[],
        action="extend",
        metavar="table.key=value",
        help="in place of the recipe's own",
    )
    command.add_argument("--out", type=Path, help="the run's folder (runs/<recipe>)")
    command.add_argument("--fresh", action="store_true", help="begin anew; else go on or be done")
    command.set_defaults(run=_run_distill)


def _run_distill(args: argparse.Namespace) -> int:
    from fused_lora.distill.recipe import read
    from fused_lora.distill.report import REPORT, text
    from fused_lora.distill.run import distill

    folder = args.out or Path("runs") / Path(args.recipe).stem
    result = distill(read(args.recipe, args.set), folder, args.fresh)
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"{text(result)}\nrun: {folder}")
        if (folder / REPORT).is_file():
            print(f"report: {folder / REPORT}")
    return 0


def _add_selftest(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "selftest",
        help="check every kernel on this device",
        description="Check every kernel against float64 on this device and print the table. The "
        "exit status is 1 if one fails; 0 without a device, where nothing can run.",
    )
    command.add_argument("--device", help="cuda, cuda:1, ... (the current one)")
    command.add_argument("--dtype", help="of float32, tf32, bfloat16, float16, by commas (all)")
    command.add_argument("--backend", help="of triton, cuda, by commas (both)")
    command.add_argument("--processes", type=int, default=1, help="that check at once (1)")
    command.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the rows to FILE, each as it comes"
    )
    command.set_defaults(run=_run_selftest)


def _run_selftest(args: argparse.Namespace) -> int:
    from fused_lora.verify.selftest import (
        BACKENDS,
        DTYPES,
        Result,
        passed_over,
        selftest,
        summary,
    )

    if args.json and not args.json.absolute().parent.is_dir():
        raise ValueError(f"--json: no folder {str(args.json.parent)!r}")
    dtypes = args.dtype.split(",") if args.dtype else tuple(DTYPES)
    backends = args.backend.split(",") if args.backend else BACKENDS
    if args.json:
        args.json.write_text("", encoding="utf-8")

    def tell(result: Result) -> None:
        print(result, flush=True)
        if args.json:
            with args.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result.row()) + "\n")

    results = selftest(args.device, dtypes, tell, backends, args.processes)
    for line in passed_over(args.device):
        print(line)
    print(summary(results, args.device or "this device"))
    return 1 if any(result.word == "FAILED" for result in results) else 0


def _add_tune(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "tune", add_help=False, help="measure which tiles are fastest on this device"
    )
    command.set_defaults(run=_run_tune)


def _run_tune(args: argparse.Namespace) -> int:
    from fused_lora.bench import tune

    return tune.run(args.rest)


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "bench", add_help=False, help="measure against naive LoRA and PEFT"
    )
    command.set_defaults(run=_run_bench)


def _run_bench(args: argparse.Namespace) -> int:
    from fused_lora import bench

    return bench.main(args.rest)


def environment() -> dict[str, list[tuple[str, str]]]:
    """What a bug report should hold: sections of (name, value)."""
    return {
        "versions": list(_versions()),
        "devices": list(_devices()),
        "backends": list(_backends()),
        "variables": [(name, _variable(name)) for name in env.VARIABLES],
        "folders": [("cache", str(env.cache_dir()))],
    }


def _versions() -> Iterator[tuple[str, str]]:
    yield "fused_lora", __version__
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield "torch", torch.__version__
    yield "triton", _installed("triton")
    yield "CUDA of torch", torch.version.cuda or "none"
    driver = Path("/sys/module/nvidia/version")
    yield "NVIDIA driver", driver.read_text().strip() if driver.exists() else "none"


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> Iterator[tuple[str, str]]:
    yield "cpu", f"{torch.get_num_threads()} threads of {os.cpu_count()} processors"
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory_gib = device.total_memory / 2**30
        yield f"cuda:{index}", f"{device.name}, {device.major}.{device.minor}, {memory_gib:.0f} GiB"


def _backends() -> Iterator[tuple[str, str]]:
    yield "aten", "available"
    yield "triton", available.why_not() or TRITON
    yield "cuda", native.why_not() or CUDA
    if native.why_not_here() is None:
        yield "compiled for", ", ".join(native.archs())
        for kernel, code in native.compiled_without().items():
            yield f"cuda {kernel}", f"compiled without {code}: empty, and not used"


def _variable(name: str) -> str:
    """The value set, if any, and what the variable means."""
    return f"{env.text(name) or 'unset'} ({env.VARIABLES[name]})"


if __name__ == "__main__":
    raise SystemExit(main())
