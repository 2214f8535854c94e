"""share_adapters: a student that computes with parts of its teacher's adapters.

Block i of the student takes those of block g(i) of the teacher; of each adapter the first K_s
inputs, the first N_s outputs (of each of q, k and v) and the first R ranks (SLAD, see slad.py).
Which part each linear gets is decided before anything is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from fused_lora.arguments import brief, module_of, whole
from fused_lora.distill.blocks import Block, Part, blocks_of
from fused_lora.nn import AdaptedLinear, AdapterConfig
from fused_lora.nn.adapted import check_adoptable, check_rank
from fused_lora.nn.shared import SharedLoRALinear
from fused_lora.nn.shared_parameters import SharedAdapter
from fused_lora.patching.explain import plan_words, plans_once
from fused_lora.patching.observe import observe
from fused_lora.patching.options import patterns_of
from fused_lora.patching.patch import RECORD, adapted, check_trainable, freeze
from fused_lora.patching.report import PatchError, PatchReport, ProjectionRow
from fused_lora.patching.rules import find
from fused_lora.types import Span


@dataclass(frozen=True)
class SharedProjection:
    """One linear of the student: its loans by group, and how its adapters compute."""

    name: str  # dotted
    linear: nn.Linear
    keys: tuple[str, ...]  # the parts that share: "q", "v"
    loans: dict[str, SharedAdapter]
    config: AdapterConfig


def shared_projections(
    pairs: Iterable[tuple[Block, Block]], rank: int | None
) -> list[SharedProjection]:
    """The deals of all (student block, teacher block); raises PatchError where one cannot be."""
    found: dict[nn.Module, SharedProjection] = {}
    for mine, theirs in pairs:
        offered = _offered(theirs)
        _check_keys(mine, theirs, offered)
        by_linear: dict[str, list[Part]] = {}
        for part in mine.parts.values():
            by_linear.setdefault(part.name, []).append(part)
        for name, parts in by_linear.items():
            if any(part.key in offered for part in parts):
                found.setdefault(parts[0].module, _deal(name, parts, offered, rank))
    if not found:
        raise PatchError("none of the teacher's blocks that the mapping names carries adapters")
    return list(found.values())


def _offered(block: Block) -> dict[str, tuple[Part, SharedAdapter]]:
    """The parts of a teacher's block that carry an adapter, each as a loan of the whole of it."""
    offered = {}
    for key, part in block.parts.items():
        groups = part.module.groups if isinstance(part.module, AdaptedLinear) else {}
        for group, span in groups.items():
            if span.start <= part.start and part.stop <= span.stop:
                whole = Span(part.start, part.stop, span.rank)
                assert isinstance(part.module, AdaptedLinear)
                offered[key] = (
                    part,
                    SharedAdapter(part.module, group, part.start - span.start, whole),
                )
            elif span.start < part.stop and part.start < span.stop:
                raise PatchError(
                    f"the teacher's {part.name}: the adapter {group!r} acts on columns "
                    f"{span.start} to {span.stop}, which is a piece of {key}'s {part.start} to "
                    f"{part.stop}"
                )
    return offered


def _check_keys(mine: Block, theirs: Block, offered: dict[str, tuple[Part, SharedAdapter]]) -> None:
    roles = {key.partition("_")[0] for key in offered}
    wanted = {key for key in mine.parts if key.partition("_")[0] in roles}
    if unmatched := sorted(wanted ^ set(offered)):
        raise PatchError(
            f"no counterpart for {unmatched}: the student's {mine.name} has {sorted(wanted)}, the "
            f"teacher's {theirs.name} has adapters on {sorted(offered)}"
        )
    for key in wanted:
        if key.startswith("fc") and _packed(mine, key) != _packed(theirs, key):
            raise PatchError(
                f"the gate and the value of {mine.name} and {theirs.name} are packed in one linear "
                "in only one of the two: their halves cannot be told apart"
            )


def _packed(block: Block, key: str) -> bool:
    return sum(part.name == block.parts[key].name for part in block.parts.values()) > 1


def _deal(
    name: str, parts: list[Part], offered: dict[str, tuple[Part, SharedAdapter]], rank: int | None
) -> SharedProjection:
    try:
        linear = check_adoptable(parts[0].module, f"the student's {name}")
    except TypeError as error:
        raise PatchError(str(error)) from None
    shared = [part for part in parts if part.key in offered]
    loans = {
        part.key if len(parts) > 1 else "": _loan(linear, part, *offered[part.key], rank)
        for part in shared
    }
    configs = [loan.owner.config for loan in loans.values()]
    if len({(config.dropout, config.impl, config.base_dtype) for config in configs}) > 1:
        raise PatchError(f"{name}: the teacher's adapters for it differ in dropout, impl or base")
    return SharedProjection(name, linear, tuple(part.key for part in shared), loans, configs[0])


def _loan(
    linear: nn.Linear, mine: Part, theirs: Part, whole: SharedAdapter, rank: int | None
) -> SharedAdapter:
    k, n = linear.in_features, mine.stop - mine.start
    wide, tall = whole.owner.in_features, whole.span.width
    if k > wide or n > tall:
        raise PatchError(
            f"the student's {mine.name} ({mine.key}) is [{n}, {k}], the teacher's {theirs.name} "
            f"[{tall}, {wide}]: a student may be no wider than its teacher"
        )
    r = whole.span.rank if rank is None else rank
    try:
        check_rank(r, mine.name)
    except ValueError as error:
        raise PatchError(str(error)) from None
    if r > whole.span.rank:
        raise PatchError(
            f"rank {r} is above that of the teacher's {theirs.name}, {whole.span.rank}"
        )
    a, _ = whole.owner.adapter(whole.group)
    if a.device != linear.weight.device:
        raise PatchError(
            f"the student's {mine.name} is on {linear.weight.device}, the teacher's on {a.device}"
        )
    return SharedAdapter(whole.owner, whole.group, whole.first, Span(mine.start, mine.stop, r))


MAPPINGS: Mapping[str, Callable[[int, int, int], int]] = {
    "first": lambda i, students, teachers: i,
    "last": lambda i, students, teachers: teachers - students + i,
    "even": lambda i, students, teachers: i * teachers // students,
}


def share_adapters(
    teacher: nn.Module,
    student: nn.Module,
    mapping: str | Callable[[int], int] = "even",
    *,
    rank: int | None = None,
    trainable: Iterable[str] = (),
    example_input: Any = None,
    batch_size: int = 32,
) -> PatchReport:
    """Let the student's blocks compute with parts of the teacher's adapters, and freeze its rest.

    The adapters stay the teacher's parameters, in its state dict and no other, so give the
    optimizer the teacher's (and DDP a module that holds both models). The student's gradient is
    added to them in place. ``fused_lora.save``, ``merge`` and ``unpatch`` take the student alone;
    ``unshare_adapters`` gives it copies of its own.

    Args:
        teacher: a patched model, not merged.
        student: a vision transformer, not patched, no wider than the teacher; its linears keep
            their identity, weights and keys.
        mapping: the teacher's block for block i of the student, of L_t and L_s: "first" i, "last"
            L_t - L_s + i, "even" i L_t // L_s, or a function of i.
        rank: the leading ranks that the student uses of each adapter; None for all.
        trainable: regular expressions of the student's parameters that go on training.
        example_input: what the student's trial forward is called with; None for one image.
        batch_size: what the report's plans are made for.

    Returns:
        The report on the student, which counts only what the student owns.

    Raises:
        PatchError: an unpatched or merged teacher, a patched student, a mapping that leaves the
            teacher's blocks, projections without counterpart, a student wider than the teacher, a
            rank above the teacher's, devices that differ; both models are left as they were.
        ValueError: an option out of range.
    """
    whole("batch_size", batch_size)
    trained = patterns_of(trainable)
    _check_models(teacher, student)
    check_trainable(student, trained)
    found = shared_projections(_pairs(teacher, student, mapping), rank)
    rows = _rows_per_image(student, {projection.name for projection in found}, example_input)
    _adopt(found)
    froze = freeze(student, trained)
    report = _report(student, found, rows, froze, batch_size)
    student.__dict__[RECORD] = report
    return report


def unshare_adapters(student: nn.Module) -> None:
    """Give the student copies of its parts as parameters of its own; it then shares nothing.

    Raises:
        PatchError: the student shares no adapters.
    """
    module_of(student, "student", PatchError)
    shared = [m for m in student.modules() if isinstance(m, SharedLoRALinear)]
    if not shared:
        raise PatchError(f"{type(student).__name__} shares no adapters")
    for module in shared:
        module.own()


def shared_parameters(student: nn.Module) -> list[nn.Parameter]:
    """The teacher's parameters, of those that train, of which the student has parts; each once."""
    shared = [m for m in student.modules() if isinstance(m, SharedLoRALinear)]
    loans = [loan for module in shared for loan in module.shared_adapters.values()]
    halves = [half for loan in loans for half in loan.owner.adapter(loan.group)]
    found = {id(half): half for half in halves if half.requires_grad}
    return list(found.values())  # type: ignore[arg-type]


def _check_models(teacher: nn.Module, student: nn.Module) -> None:
    module_of(teacher, "teacher", PatchError)
    module_of(student, "student", PatchError)
    for name, module in adapted(teacher):
        if module.merged:
            raise PatchError(f"the teacher's {name} is merged: call fused_lora.unmerge on it first")
        if isinstance(module, SharedLoRALinear):
            raise PatchError(f"the teacher's {name} is itself a student's: share its owner's")
        if hasattr(module, "parametrizations"):
            raise PatchError(f"the teacher's {name} is parametrized: parts of it cannot be shared")
    for name, module in student.named_modules():
        if isinstance(module, AdaptedLinear):
            raise PatchError(f"the student's {name} carries adapters already: unpatch it first")


def _pairs(teacher: nn.Module, student: nn.Module, mapping: str | Callable[[int], int]) -> Any:
    mine, theirs = blocks_of(student), blocks_of(teacher)
    choose = _chooser(mapping, len(mine), len(theirs))
    for i, block in enumerate(mine):
        g = choose(i)
        if isinstance(g, bool) or not isinstance(g, int) or not 0 <= g < len(theirs):
            raise PatchError(
                f"mapping {brief(mapping)} sends block {i} of the student's {len(mine)} to "
                f"{brief(g)}; the teacher's blocks are 0 to {len(theirs) - 1}"
            )
        yield block, theirs[g]


def _chooser(
    mapping: str | Callable[[int], int], students: int, teachers: int
) -> Callable[[int], Any]:
    if callable(mapping) and not isinstance(mapping, nn.Module):
        return mapping
    if not isinstance(mapping, str) or mapping not in MAPPINGS:
        words = f"one of {[*MAPPINGS]} or a function"
        raise PatchError(f"mapping must be {words}, got {brief(mapping)}")
    return lambda i: MAPPINGS[mapping](i, students, teachers)


def _rows_per_image(student: nn.Module, names: set[str], example: Any) -> dict[str, int]:
    watched = [each for each in find(student) if each.name in names]
    observations = observe(student, watched, example)
    for name, observed in observations.items():
        if observed.read or not observed.called:
            raise PatchError(
                f"{name} is never called by the student's forward, or its weight is read beside "
                "it: sharing would do nothing there"
            )
    return {name: observed.rows for name, observed in observations.items()}


def _adopt(found: list[SharedProjection]) -> None:
    done: list[AdaptedLinear] = []
    try:
        for projection in found:
            done.append(
                SharedLoRALinear.adopt(projection.linear, projection.loans, projection.config)
            )
    except BaseException:
        for module in done:
            module.release()
        raise


def _report(
    student: nn.Module,
    found: list[SharedProjection],
    rows_per_image: dict[str, int],
    froze: list[str],
    batch_size: int,
) -> PatchReport:
    rows, plan_of = [], plans_once()
    for projection in found:
        module = projection.linear
        assert isinstance(module, SharedLoRALinear)
        ranks = tuple(loan.span.rank for loan in projection.loans.values())
        plan = plan_words(module, rows_per_image[projection.name] * batch_size, plan_of)
        keys = "|".join(projection.keys)
        rows.append(
            ProjectionRow(
                projection.name, keys, module.in_features, module.out_features, ranks, 0, plan
            )
        )
    more = {"froze": froze, "rows_per_image": rows_per_image}
    return PatchReport.of(student, rows, batch_size, **more)
