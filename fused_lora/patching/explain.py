"""explain: what runs where, and why the other ways lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_lora.arguments import brief, device_of, flag, module_of, whole
from fused_lora.kernels.triton import available
from fused_lora.nn import AdaptedLinear, FusedLoRABlock, FusedLoRAMlp, FusedLoRAWeight
from fused_lora.ops.backends import refusals
from fused_lora.ops.ceilings import ceilings
from fused_lora.ops.lora_linear_fp8 import why_not_triton
from fused_lora.ops.lora_linear_plain import DTYPES
from fused_lora.ops.planning import expected, explained, problem, traits_of
from fused_lora.patching.report import PatchError, first_and_more
from fused_lora.plan.choose import RankedPlan, traced_keep
from fused_lora.plan.problem import Ceilings, Problem
from fused_lora.programs.describe import Estimate, words
from fused_lora.programs.program import Program
from fused_lora.types import Needs, Plan

PlanOf = Callable[[AdaptedLinear, int], Plan]  # of a linear on so many rows of x
LOSERS = 4  # losing rows brief per shape


def problem_of(
    module: AdaptedLinear,
    rows: int,
    dtype: torch.dtype | None = None,
    x_needs_grad: bool = True,
    device: torch.device | str | None = None,
) -> Problem:
    """The plan's question for ``module`` on ``rows`` rows of x, by default where and as it is."""
    n, k = module.weight.shape
    a, b = zip(*module.adapters(), strict=True)
    needs = Needs(
        x_needs_grad,
        module.weight.requires_grad,
        module.bias is not None and module.bias.requires_grad,
        any(p.requires_grad for p in a),
        any(p.requires_grad for p in b),
    )
    spans = tuple(module.groups.values())
    question = (rows, k, n, spans, dtype or module.weight.dtype, module.bias is not None, needs)
    traits = traits_of(a, module.scales)
    where = module.weight.device if device is None else torch.device(device)
    return problem(*question, traits=traits, device=where)


def plan_of(module: AdaptedLinear, rows: int) -> Plan:
    """The plan that serves ``module`` on ``rows`` rows of x that need a gradient.

    Kernels that are not checked yet are taken to be right: their checks wait for the first step.
    """
    return expected(problem_of(module, rows), module.weight.dtype, module.weight.device)


def plans_once() -> PlanOf:
    """``plan_of`` for as long as one report takes: linears that are alike are asked for once."""
    found: dict[tuple[Problem, torch.dtype, torch.device], Plan] = {}

    def plan(module: AdaptedLinear, rows: int) -> Plan:
        asked = (problem_of(module, rows), module.weight.dtype, module.weight.device)
        if asked not in found:
            found[asked] = expected(*asked)
        return found[asked]

    return plan


def plan_words(module: AdaptedLinear, rows: int, plan: PlanOf = plan_of) -> str:
    """The plan as the report shows it; of a base in FP8, its own forward in the plan's place."""
    if not module.config.base_dtype:
        return str(plan(module, rows))
    q, like = problem_of(module, rows), module.weight
    return fp8_words(q, like.dtype, like.device)


def fp8_words(q: Problem, dtype: torch.dtype, device: torch.device) -> str:
    """The plan of a base in FP8: its own forward, and of the plan what backward does."""
    keep = traced_keep(q.k, q.spans, q.needs)
    plan = expected(q, dtype, device, keep)
    words = "/".join(part.value for part in (plan.dx, plan.gradient, plan.keep))
    who = "" if why_not_fp8(q, dtype, device) else "triton:"
    return f"{who}fp8/{words}"


def why_not_fp8(q: Problem, dtype: torch.dtype, device: torch.device) -> str | None:
    """One sentence why Triton serves no forward on FP8 codes; None if it does."""
    if reason := available.why_not_fp8(device, dtype):
        return reason
    rank = sum(span.rank for span in q.spans)
    return why_not_triton(q.m, q.n, q.k, rank, torch.empty(0, dtype=dtype, device=device))


def explain(
    model: nn.Module,
    batch_size: int = 1,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> str:
    """Per distinct projection: the chosen plan, the losing ones with their estimates, and why not;
    per kind of fused block what it keeps.

    Args:
        model: a patched model.
        batch_size: images per step; rows per image were found when it was patched.
        dtype: what the GEMMs compute in; None for the weights' own.
        device: plan for another device, such as "cpu"; None for the weights' own.

    Raises:
        PatchError: the model is not patched.
        ValueError: ``batch_size`` below 1, or a dtype that nothing here computes in.
    """
    from fused_lora.patching.patch import RECORD, adapted

    module_of(model, error=PatchError)
    whole("batch_size", batch_size)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in DTYPES):
        raise ValueError(f"dtype must be one of {DTYPES}, got {brief(dtype)}")
    if device is not None:
        device = device_of(device)
    rows_per_image = _rows_per_image(model, RECORD)
    shapes: dict[Problem, list[str]] = {}
    where: dict[Problem, AdaptedLinear] = {}
    unplanned: dict[str, list[str]] = {}
    for name, module in adapted(model):
        if why := _why_unplanned(module):
            unplanned.setdefault(why, []).append(name)
            continue
        rows = rows_per_image.get(module, 1) * batch_size
        question = problem_of(module, rows, dtype, device=device)
        shapes.setdefault(question, []).append(name)
        where[question] = module
    planned = [
        _paragraph(question, names, where[question], dtype, device)
        for question, names in shapes.items()
    ]
    planned += [f"{first_and_more(names)}\n  {why}" for why, names in unplanned.items()]
    planned += _of_blocks(model, rows_per_image, batch_size)
    return "\n\n".join(planned)


class _Ran(NamedTuple):
    """A module that has just run forward, so that its programs are there."""

    owner: nn.Module
    halves: list[Any]
    linears: list[AdaptedLinear]
    x: Tensor


def _ran(model: nn.Module, name: str, batch_size: int) -> _Ran:
    from fused_lora.patching.patch import RECORD

    module_of(model, error=PatchError)
    whole("batch_size", batch_size)
    modules = dict(model.named_modules())
    if not isinstance(name, str) or name not in modules:
        raise ValueError(f"name: no module is called {brief(name)}; blocks.0.mlp might be")
    owner, halves = _half_of(modules, name)
    inside = [m for m in modules[name].modules() if isinstance(m, AdaptedLinear)]
    if owner is None or not inside:
        kind = type(modules[name]).__name__
        raise ValueError(f"name: {name or 'the model'} is a {kind}: no program is made of it")
    counts = _rows_per_image(model, RECORD)
    entry = inside[0] if isinstance(owner, AdaptedLinear) else _first_linear(owner)
    shape = (batch_size, counts.get(entry, 1), entry.in_features)
    x = torch.randn(shape, dtype=entry.base.dtype, device=entry.base.device)
    owner(x.requires_grad_())
    return _Ran(owner, list(halves(owner)), inside, x)


def estimate_of(limits: Ceilings) -> Estimate:
    """Microseconds of so many FLOPs and bytes on a device."""
    return lambda flops, nbytes: max(
        flops / limits.matmul_gflops * 1e-3, nbytes / limits.bandwidth_gbs * 1e-3
    )


def programs_of(model: nn.Module, name: str, batch_size: int = 1) -> list[Program]:
    """The programs that ``explain_program`` prints, of each half that has one."""
    found = [half.last[3] for half in _ran(model, name, batch_size).halves]
    return [program for program in found if program is not None]


def explain_program(
    model: nn.Module, name: str, batch_size: int = 1, *, measure: bool = False
) -> str:
    """The programs of one module: their calls in order, what is saved, why another way lost.

    The module, or the block that computes its half, runs forward once on random numbers.

    Args:
        model: a patched model, on the device and in the dtype in question.
        name: a block, its attention or MLP, or an adapted linear, such as ``blocks.0.mlp``.
        batch_size: images per step.
        measure: time each call, beside the estimate.

    Raises:
        ValueError: no such module, or one that no program is made for.
    """
    flag("measure", measure)
    ran, modules = _ran(model, name, batch_size), dict(model.named_modules())
    x, limits = ran.x, ceilings(ran.x.device, ran.x.dtype)
    made = "\n".join(
        words(half.last[3] or _why_modules(half, ran.owner), estimate_of(limits), measure)
        for half in ran.halves
    )
    rows = x.shape[0] * x.shape[1]
    question = [problem_of(linear, rows) for linear in ran.linears]
    lost = [
        _paragraph(q, [n for n, m in modules.items() if m is linear], linear, None, None)
        for q, linear in zip(question, ran.linears, strict=True)
    ]
    return "\n\n".join([f"{name}  x {tuple(x.shape)}, {limits.name}\n{made}", *lost])


def _why_modules(half: Any, owner: Any) -> str:
    why = getattr(half, "why_not", lambda _: None)(owner)
    return f"it goes through its modules ({why})"


def _half_of(modules: dict[str, nn.Module], name: str) -> tuple[Any, Any]:
    """The module to call, and a function that gives its places that call."""
    module, parent = modules[name], modules.get(name.rpartition(".")[0])
    if isinstance(parent, FusedLoRABlock) and name.endswith((".attn", ".mlp")):
        which = 0 if name.endswith(".attn") else 1
        return parent, lambda block: [block.__dict__["_halves"][which]]
    if isinstance(module, FusedLoRABlock | FusedLoRAMlp):
        return module, lambda fused: fused.__dict__["_halves"]
    if isinstance(module, AdaptedLinear):
        return module, lambda linear: [linear.__dict__["_memo"]]
    return None, None


def _first_linear(owner: nn.Module) -> AdaptedLinear:
    return next(m for m in owner.modules() if isinstance(m, AdaptedLinear))


def _why_unplanned(module: AdaptedLinear) -> str:
    if isinstance(module, FusedLoRAWeight):
        return (
            "the model reads these weights without calling their modules: w' = w + s b a is "
            "rebuilt at every read"
        )
    return "added to its own forward" if module.additive else ""


def _of_blocks(
    model: nn.Module, rows_per_image: dict[nn.Module, int], batch_size: int
) -> list[str]:
    """What fused blocks keep for backward, and what they would in the other modes."""
    from fused_lora.patching.blocks import need_of

    names_by_words: dict[str, list[str]] = {}
    for name, block in model.named_modules():
        if isinstance(block, FusedLoRABlock):
            first = next(m for m in block.modules() if isinstance(m, AdaptedLinear))
            rows = rows_per_image.get(first, 1) * batch_size
            kept = need_of(name, block, rows).kept
            sizes = ", ".join(f"{mode} {nbytes / 1e6:,.1f} MB" for mode, nbytes in kept.items())
            words = f"  block of {rows} rows, recompute {block.recompute}; would keep: {sizes}"
            names_by_words.setdefault(words, []).append(name or "the model itself")
    return [f"{first_and_more(names)}\n{words}" for words, names in names_by_words.items()]


def _rows_per_image(model: nn.Module, record: str) -> dict[nn.Module, int]:
    """What was found when ``model``, or whichever module inside it, was patched."""
    found: dict[nn.Module, int] = {}
    for holder in model.modules():
        if report := holder.__dict__.get(record):
            modules = dict(holder.named_modules())
            counts = report.rows_per_image.items()
            found |= {modules[name]: rows for name, rows in counts if name in modules}
    return found


def _beside(row: RankedPlan) -> str:
    """What the cost model says of a plan that was timed."""
    return "" if row.estimate_us is None else f"measured; estimated {row.estimate_us:,.1f} us"


def _paragraph(
    question: Problem,
    names: list[str],
    module: AdaptedLinear,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> str:
    target = torch.device(device) if device is not None else module.weight.device
    limits = ceilings(target, dtype or module.weight.dtype)
    compute = dtype or module.weight.dtype
    ranks = "|".join(str(span.rank) for span in question.spans)
    lines = [
        first_and_more(names),
        f"  M {question.m}  K {question.k}  N {question.n}  rank {ranks}  {question.dtype} on "
        f"{limits.name} ({limits.matmul_gflops:,.0f} GFLOP/s, {limits.bandwidth_gbs:,.0f} GB/s, "
        f"{'measured' if limits.measured else 'from the table'})",
    ]
    if module.config.base_dtype:
        lines.append(f"  chosen  {fp8_words(question, compute, target)}")
        why = why_not_fp8(question, compute, target)
        return "\n".join([*lines, *([f"  not     triton: {why}"] if why else [])])
    rows, wrong = explained(question, compute, target)
    beside = "" if rows[0].estimate_us is None else f"         {_beside(rows[0])}"
    lines.append(f"  chosen  {rows[0].plan!s:38}  {rows[0].plan.time_us:12,.1f} us{beside}")
    for row in rows[1 : 1 + LOSERS]:
        ratio = row.plan.time_us / rows[0].plan.time_us
        estimate = f"{row.plan!s:38}  {row.plan.time_us:12,.1f} us  {ratio:5.2f}x"
        notes = "  ".join(filter(None, (_beside(row), row.note)))
        lines.append(f"  lost    {estimate}  {notes}".rstrip())
    refused = [*refusals(question, compute, target), *wrong]
    lines += [f"  not     {reason}" for reason in refused]
    if module.config.dropout:
        lines.append("  dropout: in training a plain linear, and the adapters added to its result")
    return "\n".join(lines)
