"""patch and unpatch: adapters on, adapters off, nothing lost in between."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from fused_lora.nn import AdaptedLinear, AdapterConfig, FusedLoRAGroupedLinear, FusedLoRALinear
from fused_lora.patching.blocks import BlockChoice, fuse, unfuse
from fused_lora.patching.errors import PatchError
from fused_lora.patching.explain import check_batch_size, plan_of
from fused_lora.patching.options import Choice, roles_of
from fused_lora.patching.report import PatchReport, Row
from fused_lora.patching.targets import Target, choose_targets
from fused_lora.patching.trace import rows_per_call
from fused_lora.types import Role

RECORD = "_fused_lora_report"  # attribute of the patched model that remembers how to go back


def patch(
    model: nn.Module,
    rank: int = 16,
    *,
    targets: Iterable[Role | str] | str | None = None,
    qkv: str = "separate",
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    trainable: Iterable[str] = (),
    example_input: Any = None,
    batch_size: int = 32,
    seed: int | None = None,
    allow_large_rank: bool = False,
    level: str = "block",
    recompute: str | Mapping[str, str] | None = None,
    memory_budget_gb: float | None = None,
    **options: Any,
) -> PatchReport:
    """Put LoRA on the projections of every transformer block, in place, and freeze the rest.

    Args:
        model: a vision transformer; its linears keep their identity, weights and keys.
        rank: R of every adapter not named in ``rank_pattern``.
        targets: which of the roles q, k, v, out, fc1, fc2; None for all six.
        qkv: on a fused qkv, "separate" adapters for q, k and v (WeCoLoRA), or one "joint"
            adapter over all three (as PEFT).
        rank_pattern: role or regular expression on the dotted name, to rank; names go first.
        alpha_pattern: likewise, to alpha.
        trainable: regular expressions of parameter names that go on training, such as "^head".
        example_input: what the trial forward is called with; None for one image.
        batch_size: what the report's plans are made for, and ``memory_budget_gb``.
        seed: of the adapters' initial values; None draws from torch's global generator.
        allow_large_rank: accept ranks above min(in_features, columns), which cost more than they
            can express; otherwise they are an error.
        level: "block" stands in for the forward of blocks and MLPs that are known, so that norms
            and activations are not kept but made again in backward, and leaves others to their
            modules, with the reason in the report; "linear" adapts each linear and nothing else.
        recompute: of fused blocks: "none", "elementwise" (the default) or "gemm", which makes qkv
            and fc1's output again as well; or a mapping from regular expression on a block's name
            to one of them.
        memory_budget_gb: in its place, choose for each block what lets a step of ``batch_size``
            images fit: weights, gradients, Adam's moments and what blocks keep. What autocast
            saves, and what lies outside the blocks, is not counted.
        **options: fields of ``fused_lora.nn.AdapterConfig`` (alpha, scale, dropout, init, ...).

    Returns:
        The report, a table when printed.

    Raises:
        PatchError: nothing to patch, an unknown Linear subclass, a projection that the model never
            calls, non-finite weights, a rank that does not fit, or a model already patched; the
            message names the module and the model is left as it was.
        ValueError: an option out of range.
    """
    choice = Choice(
        AdapterConfig(**options),
        rank,
        roles_of(targets),
        qkv,
        rank_pattern or {},
        alpha_pattern or {},
        allow_large_rank,
    )
    blocks = BlockChoice(level, recompute, memory_budget_gb)
    trained = _compiled(trainable)
    check_batch_size(batch_size)
    _refuse_patched(model)
    chosen = choose_targets(model, choice)
    _check_trainable(model, trained)
    watched = [(target.found.name, target.found.module) for target in chosen]
    rows = rows_per_call(model, watched, example_input)
    for name, _ in watched:
        if name not in rows:
            raise PatchError(
                f"{name} is never called by the model's forward, which must read its weight "
                "directly: an adapter there would silently do nothing"
            )
    generator = None if seed is None else _generator(model, seed)
    _adopt(chosen, generator)
    froze = _freeze(model, trained)
    try:
        report = _report(model, chosen, rows, froze, batch_size)
        report.blocks = fuse(model, blocks, rows, batch_size)
    except BaseException:
        unfuse(model)
        for _, module in adapted(model):
            module.release()
        _thaw(model, froze)
        raise
    model.__dict__[RECORD] = report
    return report


def unpatch(model: nn.Module, merge: bool = False) -> None:
    """Take the adapters off: plain ``nn.Linear`` again, the same weights, as trainable as before.

    Parameters that are gone since, as those of a replaced head may be, are passed over.

    Args:
        model: a patched model.
        merge: keep w' = w + s b a as the weight, so that the model computes what it learned;
            otherwise the adapters are dropped and the base weights are back, bit for bit.

    Raises:
        PatchError: the model carries no adapters, or one that cannot be taken off; the model is
            left as it was.
    """
    modules = adapted(model)
    for name, module in modules:
        try:
            module.check_releasable()
        except RuntimeError as error:
            raise PatchError(f"{name}: {error}") from None
    if merge:
        merge_all([module for _, module in modules if not module.merged])
    for _, module in modules:
        if not merge and module.merged:
            module.unmerge()
        module.release()
    unfuse(model)
    for holder in model.modules():
        if report := holder.__dict__.pop(RECORD, None):
            _thaw(holder, report.froze)


def _thaw(model: nn.Module, names: Iterable[str]) -> None:
    parameters = dict(model.named_parameters())
    for name in parameters.keys() & set(names):
        parameters[name].requires_grad_(True)


def merge_all(
    modules: Iterable[AdaptedLinear],
    rounding: str = "nearest",
    seed: int = 0,
    impl: str = "auto",
) -> None:
    """Merge each module, the seed counting on from one to the next; all of them or none."""
    done: list[AdaptedLinear] = []
    try:
        for module in modules:
            module.merge(rounding, seed + len(done), impl)
            done.append(module)
    except BaseException:
        for module in done:
            module.unmerge()
        raise


def adapted(model: nn.Module) -> list[tuple[str, AdaptedLinear]]:
    """The adapted linears of a patched model, by dotted name; raises PatchError if it has none."""
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, AdaptedLinear)]
    if not found:
        raise PatchError(f"{type(model).__name__} carries no fused_lora adapters: patch it first")
    return found


def _refuse_patched(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise PatchError(f"expected a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            raise PatchError(f"already patched: {name or 'the model'} carries adapters; unpatch it")


def _compiled(trainable: Iterable[str]) -> list[re.Pattern[str]]:
    if isinstance(trainable, str):
        trainable = [trainable]
    try:
        return [re.compile(pattern) for pattern in trainable]
    except re.error as error:
        raise PatchError(
            f"trainable: {error.pattern!r} is no regular expression: {error}"
        ) from None


def _check_trainable(model: nn.Module, trained: list[re.Pattern[str]]) -> None:
    for pattern in trained:
        if not any(pattern.search(name) for name, _ in model.named_parameters()):
            raise PatchError(f"trainable: {pattern.pattern!r} matches no parameter of the model")


def _generator(model: nn.Module, seed: int) -> torch.Generator | None:
    device = next(model.parameters()).device
    return None if device.type == "meta" else torch.Generator(device).manual_seed(seed)


def _adopt(targets: list[Target], generator: torch.Generator | None) -> None:
    done: list[AdaptedLinear] = []
    try:
        for target in targets:
            linear = target.linear
            options = vars(target.config) | {"generator": generator}
            if "" in target.spans:
                done.append(FusedLoRALinear.adopt(linear, target.ranks[""], **options))
            else:
                done.append(
                    FusedLoRAGroupedLinear.adopt(linear, target.spans, target.ranks, **options)
                )
    except BaseException:
        for module in done:
            module.release()
        raise


def _freeze(model: nn.Module, trained: list[re.Pattern[str]]) -> list[str]:
    froze = []
    adapters = {id(p) for _, module in adapted(model) for half in module.adapters() for p in half}
    for name, parameter in model.named_parameters():
        if id(parameter) in adapters or any(pattern.search(name) for pattern in trained):
            continue
        if parameter.requires_grad:
            froze.append(name)
            parameter.requires_grad_(False)
    return froze


def _report(
    model: nn.Module,
    targets: list[Target],
    rows_per_image: dict[str, int],
    froze: list[str],
    batch_size: int,
) -> PatchReport:
    rows = []
    for target in targets:
        module = target.found.module
        assert isinstance(module, AdaptedLinear)
        rows.append(
            Row(
                target.found.name,
                "|".join(role.value for role in target.found.roles),
                module.in_features,
                module.out_features,
                tuple(target.ranks.values()),
                sum(p.numel() for half in module.adapters() for p in half),
                str(plan_of(module, rows_per_image[target.found.name] * batch_size)),
            )
        )
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return PatchReport(
        type(model).__name__,
        rows,
        batch_size,
        str(next(model.parameters()).device),
        sum(count for count, trains in counts if trains),
        sum(count for count, _ in counts),
        froze,
        rows_per_image,
    )
