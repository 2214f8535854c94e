"""patch and unpatch, merge and unmerge, disable."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fused_lora.arguments import brief, check_known, flag, module_of, one_of, strings, whole
from fused_lora.nn import (
    AdaptedLinear,
    AdapterConfig,
    FusedLoRAGroupedLinear,
    FusedLoRALinear,
    FusedLoRAParameter,
    FusedLoRAWeight,
    adopt_additive,
)
from fused_lora.nn.adapted import merge_together
from fused_lora.nn.additive import with_plain_weights
from fused_lora.nn.child_adapters import FusedLoRAConvWeight, is_convolution
from fused_lora.nn.linear_state import weight_error
from fused_lora.nn.stand_in import offloaded
from fused_lora.ops.operand import is_sharded
from fused_lora.patching.blocks import BlockChoice, fuse, unfuse
from fused_lora.patching.example import enable_input_grads, reentrant
from fused_lora.patching.explain import plan_words, plans_once
from fused_lora.patching.grouped_projections import gather
from fused_lora.patching.live_peft import fused_layers, layers_of, patch_live, release_live
from fused_lora.patching.observe import observe
from fused_lora.patching.options import Named, Selection, block_numbers, choice_of, options_given
from fused_lora.patching.originals import check_kept, first_row, forget, keep, shown
from fused_lora.patching.report import IN_WEIGHT, PatchError, PatchReport, ProjectionRow
from fused_lora.patching.targets import (
    Target,
    choose_targets,
    find_wanted,
    keeps_its_forward,
    missing_roles,
    unused_beside,
)
from fused_lora.types import Role

if TYPE_CHECKING:
    from peft import LoraConfig


ADDED = "added to its own forward"  # the plan of a linear that computes its base itself
RECORD = "_fused_lora_report"  # attribute of the patched model that remembers how to go back


def patch(
    model: nn.Module,
    rank: int | LoraConfig | None = None,
    *,
    targets: Iterable[Role | str] | str | None = None,
    qkv: str | None = None,
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
    layers: Iterable[int] | int | None = None,
    exclude: Iterable[str] | str = (),
    keep_forward: bool = False,
    **options: Any,
) -> PatchReport:
    """Put LoRA on the projections of every transformer block, in place, and freeze the rest.

    Where the model carries PEFT's LoRA already, its layers compute fused passes instead: the same
    parameters, and PEFT's own methods go on working. Layers that cannot be fused are left to PEFT
    and named in the report.

    Args:
        model: a vision transformer; its linears keep their identity, weights and keys.
        rank: R of every adapter not named in ``rank_pattern``; None for 16. Or a
            ``peft.LoraConfig``, which says all of it.
        targets: which of the roles q, k, v, out, fc1, fc2; None for all six.
        qkv: on a fused qkv, "separate" adapters for q, k and v (WeCoLoRA), or one "joint"
            adapter over all three (as PEFT). None for "separate", or "joint" with a LoraConfig.
        rank_pattern: role or regular expression on the dotted name, to rank; names go first.
        alpha_pattern: likewise, to alpha.
        trainable: regular expressions of parameter names that go on training, such as "^head".
        example_input: what the trial forward is called with; None for one image.
        batch_size: what the report's plans are made for, and ``memory_budget_gb``.
        seed: of the adapters' initial values; None draws from torch's global generator.
        allow_large_rank: accept ranks above min(in_features, columns), which cost more than they
            can express; otherwise they are an error.
        level: "block" stands in for the forward of blocks and MLPs that are known, so that norms
            and activations are not kept but recomputed in backward, and leaves others to their
            modules, with the reason in the report; separate q, k and v that are given one x are
            computed in one call. "linear" adapts each linear and nothing else.
        recompute: of fused blocks: "none", "elementwise" (the default) or "gemm", which
            recomputes qkv and fc1's output as well; or a mapping from regular expression on a
            block's name to one of them.
        memory_budget_gb: in its place, choose for each block what lets a step of ``batch_size``
            images fit: weights, gradients, Adam's moments and what blocks keep. What autocast
            saves, and what lies outside the blocks or in modules unknown here, is not counted.
        layers: numbers of the blocks to adapt; None for all of them.
        exclude: regular expressions of dotted names to leave out.
        keep_forward: adapt linears of other classes too (8 or 4 bits, fp8): their own forward
            computes the base and the adapters are added to its result; merging them needs a base
            with an ordinary weight.
        **options: fields of ``fused_lora.nn.AdapterConfig`` (alpha, scale, dropout, init, ...).

    Returns:
        The report, a table when printed.

    Raises:
        PatchError: nothing to patch, an unknown Linear subclass, a projection that the model never
            calls, non-finite weights, a rank that does not fit, or a model already patched; the
            message names the module and the model is left as it was.
        ValueError: an option out of range.
    """
    known = [name for name in inspect.signature(patch).parameters if name != "options"]
    check_known("patch", options, [*known, *(field.name for field in fields(AdapterConfig))])
    module_of(model, error=PatchError)
    blocks = BlockChoice(level, recompute, memory_budget_gb)
    whole("batch_size", batch_size)
    flag("allow_large_rank", allow_large_rank)
    leave = strings("exclude", exclude, PatchError)
    selection = Selection(block_numbers(layers), leave, flag("keep_forward", keep_forward))
    given = (
        options_given(rank, targets, qkv, rank_pattern, alpha_pattern, trainable, seed) | options
    )
    if layers_of(model):
        if recompute is not None or memory_budget_gb is not None or selection != Selection():
            raise PatchError(
                f"recompute={brief(recompute)}, memory_budget_gb={memory_budget_gb}, "
                f"layers={brief(layers)}, exclude={brief(exclude)}, keep_forward={keep_forward}: "
                "a live PEFT model is fused layer by layer as it is; unload it and patch the "
                "plain model"
            )
        model.__dict__[RECORD] = patch_live(model, given, example_input, batch_size)
        return model.__dict__[RECORD]
    choice, trained = choice_of(given, allow_large_rank, selection)
    _refuse_patched(model)
    found = find_wanted(model, choice)
    check_trainable(model, trained)
    additive = (each.module for each in found if keep_forward and keeps_its_forward(each.module))
    with with_plain_weights(additive):
        observations = observe(model, found, example_input)
    unused = unused_beside(found, observations)
    found = [each for each in found if each.name not in unused]
    chosen = choose_targets(model, found, observations, choice)
    rows = {each.name: observations[each.name].rows for each in found}
    left = missing_roles(found, choice) | unused
    if choice.only is not None:
        left |= Named.by(choice.only, model).passed_over(rows)
    generator = None if seed is None else _generator(model, seed)
    _adopt(chosen, generator)
    froze = freeze(model, trained)
    try:
        report = _report(model, chosen, rows, froze, batch_size, left)
        report.blocks = fuse(model, blocks, rows, batch_size)
        report.shares = gather(model, chosen, observations) if blocks.level == "block" else []
    except BaseException:
        unfuse(model)
        for _, module in adapted(model):
            module.release()
        _thaw(model, froze)
        forget(model)
        raise
    report.base_row = first_row(model)
    _let_checkpoints_train(model, report)
    model.__dict__[RECORD] = report
    return report


def _let_checkpoints_train(model: nn.Module, report: PatchReport) -> None:
    """Where reentrant checkpoints are on and the stem is frozen, its output gets a gradient."""
    if reentrant(model):
        report.hook = enable_input_grads(model)


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
    module_of(model, error=PatchError)
    flag("merge", merge)
    if fused_layers(model):
        if merge:
            raise PatchError("merge=True: PEFT holds these adapters; call its merge_and_unload()")
        release_live(model)
        return _forget(model)
    modules = adapted(model)
    for name, module in modules:
        try:
            module.check_releasable()
        except RuntimeError as error:
            raise PatchError(f"{name}: {error}") from None
    if merge:
        left = [(name, module) for name, module in modules if not module.merged]
        check_mergeable(left)
        merge_all([module for _, module in left])
    for _, module in modules:
        if not merge and module.merged:
            module.unmerge()
        module.release()
    unfuse(model)
    _forget(model)


def _forget(model: nn.Module) -> None:
    """Drop the report and the originals, and let train what it froze."""
    forget(model)
    for holder in model.modules():
        if report := holder.__dict__.pop(RECORD, None):
            _thaw(holder, report.froze)
            if report.hook is not None:
                report.hook.remove()


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
    merge_together(list(modules), rounding, seed, impl)


def check_mergeable(modules: Iterable[tuple[str, AdaptedLinear]]) -> None:
    """Raises PatchError, with the module's name, where one cannot be merged."""
    for name, module in modules:
        try:
            module.check_mergeable()
        except RuntimeError as error:
            raise PatchError(f"{name}: {error}") from None


def adapted(model: nn.Module) -> list[tuple[str, AdaptedLinear]]:
    """The adapted linears of a patched model, by dotted name; raises PatchError if it has none."""
    module_of(model, error=PatchError)
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, AdaptedLinear)]
    if not found and layers_of(model):
        raise PatchError(
            f"{type(model).__name__} carries PEFT's adapters: call PEFT's own methods "
            "(merge_adapter, disable_adapter, save_pretrained, ...), which patch keeps working"
        )
    if not found:
        raise PatchError(f"{type(model).__name__} carries no fused_lora adapters: patch it first")
    return found


def _refuse_patched(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            raise PatchError(f"already patched: {name or 'the model'} carries adapters; unpatch it")
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise PatchError(f"{name} is sharded over processes: patch first, then fully_shard")


def check_trainable(model: nn.Module, trained: list[re.Pattern[str]]) -> None:
    """Raises PatchError for a pattern that matches no parameter."""
    for pattern in trained:
        if not any(pattern.search(name) for name, _ in model.named_parameters()):
            raise PatchError(
                f"trainable: {brief(pattern.pattern)} matches no parameter of the model"
            )


def _generator(model: nn.Module, seed: int) -> torch.Generator | None:
    device = next(model.parameters()).device
    return None if device.type == "meta" else torch.Generator(device).manual_seed(seed)


def _adopt(targets: list[Target], generator: torch.Generator | None) -> None:
    done: list[AdaptedLinear] = []
    try:
        for target in targets:
            done.append(_adopt_one(target, vars(target.config) | {"generator": generator}))
            for name, scale in target.scales.items():
                done[-1].set_scale(scale, name)
    except BaseException:
        for module in done:
            module.release()
        raise


def _adopt_one(target: Target, options: dict[str, Any]) -> AdaptedLinear:
    module, tensor, spans, ranks = (
        target.found.module,
        target.found.tensor,
        target.spans,
        target.ranks,
    )
    if is_convolution(module):
        return FusedLoRAConvWeight.attach(module, ranks[""], **options)
    if tensor != "weight":
        return FusedLoRAParameter.attach(module, tensor, spans, ranks, **options)
    assert isinstance(module, nn.Linear)
    if target.read:
        return FusedLoRAWeight.adopt(module, spans, ranks, **options)
    if keeps_its_forward(module):
        return adopt_additive(
            module, ranks.get("", ranks), spans if "" not in spans else None, **options
        )
    if "" in spans:
        return FusedLoRALinear.adopt(module, ranks[""], **options)
    return FusedLoRAGroupedLinear.adopt(module, spans, ranks, **options)


def freeze(model: nn.Module, trained: list[re.Pattern[str]]) -> list[str]:
    """Freeze all but adapters and ``trained``, whose originals are kept; the names frozen."""
    froze, trains = [], []
    adapters = {id(p) for _, module in adapted(model) for p in module.lora_parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) in adapters:
            continue
        if any(pattern.search(name) for pattern in trained):
            trains.append(parameter)
            continue
        if parameter.requires_grad:
            froze.append(name)
            parameter.requires_grad_(False)
    keep(model, trains)
    return froze


def _report(
    model: nn.Module,
    targets: list[Target],
    rows_per_image: dict[str, int],
    froze: list[str],
    batch_size: int,
    left: dict[str, str],
) -> PatchReport:
    rows, plan = [], plans_once()
    for target in targets:
        module = model.get_submodule(target.found.path)
        assert isinstance(module, AdaptedLinear)
        m = rows_per_image[target.found.name] * batch_size
        special = IN_WEIGHT if target.read else ADDED if module.additive else None
        rows.append(
            ProjectionRow(
                target.found.name,
                "|".join(role.value for role in target.found.roles) or "-",
                module.in_features,
                module.out_features,
                tuple(target.ranks.values()),
                sum(p.numel() for p in module.lora_parameters()),
                special or plan_words(module, m, plan),
                weight_error(module.base) if module.config.base_dtype else None,
            )
        )
    more = {"froze": froze, "rows_per_image": rows_per_image, "left_alone": left}
    return PatchReport.of(model, rows, batch_size, **more)


TRAINED = ("original", "current")  # what ``disable`` shows of what trains beside the adapters


def merge(model: nn.Module, rounding: str = "nearest", seed: int = 0, impl: str = "auto") -> None:
    """Fold every adapter into its weight: w' = w + s b a. The frozen weights are kept.

    Args:
        model: a patched model.
        rounding: "nearest", or "stochastic" for 16-bit weights, by ``seed``.
        seed: of the counter-based generator; each layer draws its own numbers.
        impl: as in ``fused_lora.ops.lora_merge``.

    Raises:
        PatchError: no adapters, or some already merged; nothing is changed.
    """
    modules = adapted(model)
    whole("seed", seed, None)
    for name, module in modules:
        if module.merged:
            raise PatchError(f"{name} is already merged; unmerge the model first")
    check_mergeable(modules)
    merge_all((module for _, module in modules), rounding, seed, impl)


def unmerge(model: nn.Module) -> None:
    """Put every frozen weight back, the same bits; raises PatchError where one is not merged."""
    modules = adapted(model)
    for name, module in modules:
        if not module.merged:
            raise PatchError(f"{name} is not merged")
        if why := offloaded(module):
            raise PatchError(f"unmerge: {name}: {why}")
    for _, module in modules:
        module.unmerge()


@contextmanager
def disable(model: nn.Module, trained: str = "original") -> Iterator[None]:
    """Within the ``with`` block the model computes what it did before ``patch``.

    Args:
        model: a patched model, or a part of one.
        trained: what stands for the parameters that train beside the adapters (``trainable=``, a
            LoraConfig's ``modules_to_save``): "original", as ``patch`` found them, or "current",
            as they are now, so that the adapters alone are left off.

    Raises:
        PatchError: something trains of which no original is known, as where it was named after
            ``patch``, or another base was loaded since.
    """
    one_of("trained", trained, TRAINED, PatchError)
    modules = [module for _, module in adapted(model)]
    original = trained == TRAINED[0]
    for report in (m.__dict__[RECORD] for m in model.modules() if RECORD in m.__dict__):
        if original:
            check_kept(model, report.base_row)
    before = [module.adapter_enabled for module in modules]
    with shown(model) if original else nullcontext():
        for module in modules:
            module.adapter_enabled = False
        try:
            yield
        finally:
            for module, enabled in zip(modules, before, strict=True):
                module.adapter_enabled = enabled
