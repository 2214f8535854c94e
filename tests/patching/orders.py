"""Random orders of what people do to a model, beside a naive model that goes the same way."""

from __future__ import annotations

import copy
import pickle
import random
import tempfile

import torch
from accelerate.hooks import attach_align_device_hook_on_blocks, remove_hook_from_submodules
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.utils import prune

import fused_lora
from fused_lora.nn import AdaptedLinear

ALLOWED = (RuntimeError, ValueError, TypeError)  # with a sentence that names something
LINEARS = ("blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2")
NAMES = ("blocks", "merged", "patch", "adapters", "state_dict")  # one of them is in every refusal
SELDOM = {
    "compile": 0.05,  # a second or more each
    "call the compiled": 1.0,
}  # how often, beside 1 of others: it takes seconds


def tiny() -> nn.Module:
    """One block of width 8, five tokens."""
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}
    return VisionTransformer(**sizes, mlp_ratio=2, num_classes=3).eval()


def double(module, args, y):
    """A hook of the user's."""
    return 2 * y


class Walk:
    """A patched model, and the naive one: a plain model and its (s b a) by linear."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        self.model = tiny()
        self.plain = copy.deepcopy(self.model)
        self.adapters: dict[str, dict[str, tuple]] = {}  # linear -> group -> (a, b, s, rows)
        self.frozen: set[str] = set()
        self.saved: dict[str, dict[str, tuple]] | None = None
        self.state: tuple | None = None
        self.compiled: tuple[nn.Module, nn.Module] | None = None  # of which model
        self.folder = tempfile.TemporaryDirectory()
        self.done: list[str] = []

    def run(self, steps: int) -> None:
        """As many random actions, compared after each."""
        for i in range(steps):
            name = self.random.choice(sorted(ACTIONS))
            if self.random.random() > SELDOM.get(name, 1.0):
                name = "eval"
            if i == 0 and self.random.random() < 0.75:  # else most of them meet a plain model
                name = "patch"
            self.done.append(name)
            try:
                ACTIONS[name](self)
            except ALLOWED as error:
                assert any(word in str(error) for word in NAMES), (self.done, error)
                self.done[-1] += " (refused)"
            self.compare()
        if self.compiled:
            torch._dynamo.reset()

    # the naive model

    def naive(self, x: Tensor, leaves: dict[str, tuple[Tensor, Tensor]] | None = None) -> Tensor:
        weights = {}
        for name, groups in self.adapters.items():
            module = self.plain.get_submodule(name)
            w = getattr(module, "weight_orig", module.weight)  # what pruning made may be stale
            delta = torch.zeros_like(w)
            for group, (a, b, s, rows) in groups.items():
                if leaves is not None:
                    a, b = leaves[f"{name}|{group}"]
                inside = s * (b.double() @ a.double())
                before, after = rows[0], w.shape[0] - rows[1]
                delta = delta + nn.functional.pad(inside, (0, 0, before, after)).to(w.dtype)
            weights[name] = delta
        handles = [
            self.plain.get_submodule(name).register_forward_hook(
                lambda m, args, y, d=delta: y + nn.functional.linear(args[0], d), prepend=True
            )
            for name, delta in weights.items()
        ]
        try:
            return self.plain(x)
        finally:
            for handle in handles:
                handle.remove()

    def compare(self, run: nn.Module | None = None) -> None:
        """Outputs and gradients of the model, or of what runs it, and the naive one's."""
        model, said = self.model, (self.done,)
        run = model if run is None else run
        x = torch.randn(2, 3, 8, 8, dtype=next(model.parameters()).dtype)
        training = model.training
        with torch.no_grad():
            model.eval()
            close(run(x), self.naive(x), said)
        model.train(training)
        modules = dict(model.named_modules())
        merged = any(isinstance(m, AdaptedLinear) and m.merged for m in modules.values())
        if not self.adapters or merged:
            return
        leaves = {
            f"{name}|{group}": tuple(half.clone().requires_grad_(True) for half in (a, b))
            for name, groups in self.adapters.items()
            for group, (a, b, _, _) in groups.items()
        }
        for parameter in model.parameters():
            parameter.grad = None
        run(x).square().sum().backward()
        self.naive(x, leaves).square().sum().backward()
        # a gradient that cancels, as q's and k's may, is rounded as what it is the sum of
        floor = 0.1 * max(float(half.grad.abs().max()) for pair in leaves.values() for half in pair)
        for key, halves in leaves.items():
            name, _, group = key.partition("|")
            for word, half in zip(("lora_A", "lora_B"), halves, strict=True):
                own = getattr(modules[name], f"{word}_{group}" if group else word)
                if word in self.frozen:
                    assert own.grad is None, (*said, key, word)
                else:
                    close(own.grad, half.grad, (*said, key, word), floor)

    def read(self) -> dict[str, dict[str, tuple]]:
        """The adapters as the model has them."""
        found = {}
        for name in LINEARS:
            module = self.model.get_submodule(name)
            if isinstance(module, AdaptedLinear):
                spans = zip(module.groups.items(), module.scales, strict=True)
                found[name] = {
                    group: (*map(copied, module.adapter(group)), s, (span.start, span.stop))
                    for (group, span), s in spans
                }
        return found

    def linears(self) -> list[tuple[nn.Module, nn.Module]]:
        name = self.random.choice(LINEARS)
        return [(self.model.get_submodule(name), self.plain.get_submodule(name))]


def copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def close(found: Tensor | None, wanted: Tensor, said: tuple, floor: float = 1e-6) -> None:
    assert found is not None, said
    size = max(float(wanted.detach().abs().max()), floor)
    off = float((found.detach().double() - wanted.detach().double()).abs().max()) / size
    assert off < 2e-4, (*said, off)


def _patch(walk: Walk) -> None:
    options = walk.random.choice(
        [{}, {"qkv": "joint"}, {"level": "linear"}, {"targets": ["q", "fc1"]}, {"alpha": 4.0}]
    )
    fused_lora.patch(walk.model, rank=2, recompute=None, batch_size=2, **options)
    walk.frozen = set()
    with torch.no_grad():
        for name, parameter in walk.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    walk.adapters = walk.read()


def _unpatch(walk: Walk) -> None:
    fused_lora.unpatch(walk.model)
    walk.adapters = {}


def _disable(walk: Walk) -> None:
    x = torch.randn(2, 3, 8, 8, dtype=next(walk.model.parameters()).dtype)
    training = walk.model.training
    with fused_lora.disable(walk.model), torch.no_grad():
        close(walk.model.eval()(x), walk.plain(x), (walk.done,))
    walk.model.train(training)


def _save(walk: Walk) -> None:
    fused_lora.save(walk.model, walk.folder.name)
    walk.saved = copy.deepcopy(walk.adapters)


def _load(walk: Walk) -> None:
    if walk.saved is None:
        return
    before = walk.read()
    try:
        fused_lora.load(walk.model, walk.folder.name)
    except ValueError:
        now = walk.read()
        for name, groups in before.items():
            for group, (a, b, *_) in groups.items():
                assert torch.equal(now[name][group][0], a) and torch.equal(now[name][group][1], b)
        raise
    walk.adapters = walk.read()
    for name, groups in walk.saved.items():
        whole, mine = (
            sum(s * pad(b, rows) @ a.double() for a, b, s, rows in each.values())
            for each in (groups, walk.adapters[name])
        )
        torch.testing.assert_close(mine, whole, rtol=1e-5, atol=1e-6)


def pad(b: Tensor, rows: tuple[int, int]) -> Tensor:
    return nn.functional.pad(b.double(), (0, 0, rows[0], 24 - rows[1]))


def _checkpoint(walk: Walk) -> None:
    walk.state = (
        {k: copied(v) for k, v in walk.model.state_dict().items()},
        copy.deepcopy(walk.adapters),
        {k: copied(v) for k, v in walk.plain.state_dict().items()},
    )


def _resume(walk: Walk) -> None:
    if walk.state is None:
        return
    mine, adapters, plain = walk.state
    if walk.model.state_dict().keys() != mine.keys():
        raise ValueError("another state_dict, of other adapters")
    walk.model.load_state_dict(mine)
    walk.plain.load_state_dict(plain)
    shapes = {n: {g: e[2:] for g, e in each.items()} for n, each in walk.adapters.items()}
    walk.adapters = {  # scales are the model's own
        name: {group: (a, b, *shapes[name][group]) for group, (a, b, *_) in groups.items()}
        for name, groups in adapters.items()
    }
    _cast(walk)


def _cast(walk: Walk) -> None:
    dtypes = {n: p.dtype for n, p in walk.model.named_parameters() if "lora_" in n}
    dtype = next(iter(dtypes.values()), torch.float32)
    walk.adapters = {
        name: {group: (a.to(dtype), b.to(dtype), *rest) for group, (a, b, *rest) in each.items()}
        for name, each in walk.adapters.items()
    }


def _to(dtype: torch.dtype):
    def move(walk: Walk) -> None:
        walk.model.to(dtype)
        walk.plain.to(dtype)
        _cast(walk)

    return move


def _through_meta(walk: Walk) -> None:
    state = {k: copied(v) for k, v in walk.model.state_dict().items()}
    walk.model.to("meta")
    walk.model.to_empty(device="cpu")
    walk.model.load_state_dict(state)


def _replace(make):
    def action(walk: Walk) -> None:
        walk.model = make(walk.model)

    return action


def _prune(walk: Walk) -> None:
    for mine, theirs in walk.linears():
        if hasattr(mine, "weight_orig") or getattr(mine, "merged", False):
            raise RuntimeError("pruned or merged already")
        prune.l1_unstructured(mine, "weight", 0.3)
        prune.l1_unstructured(theirs, "weight", 0.3)


def _prune_for_good(walk: Walk) -> None:
    for name in LINEARS:
        for model in (walk.model, walk.plain):
            if hasattr(model.get_submodule(name), "weight_orig"):
                prune.remove(model.get_submodule(name), "weight")


def _hook(walk: Walk) -> None:
    for mine, theirs in walk.linears():
        mine.register_forward_hook(double)
        theirs.register_forward_hook(double)


def _freeze(walk: Walk) -> None:
    word = walk.random.choice(["lora_A", "lora_B"])
    if not walk.adapters or walk.frozen:
        return
    for name, parameter in walk.model.named_parameters():
        if word in name:
            parameter.requires_grad_(False)
    walk.frozen = {word}


def _freeze_all(walk: Walk) -> None:
    walk.plain.requires_grad_(False)


def _merge_and_back(walk: Walk) -> None:
    fused_lora.merge(walk.model)
    walk.compare()
    fused_lora.unmerge(walk.model)


def _compile(walk: Walk) -> None:
    torch._dynamo.reset()
    walk.compiled = walk.model, torch.compile(walk.model, backend="eager")
    walk.compare(walk.compiled[1])


def _call_the_compiled(walk: Walk) -> None:
    """Whatever happened to the model since is seen."""
    if walk.compiled and walk.compiled[0] is walk.model:
        walk.compare(walk.compiled[1])


def _dispatch(walk: Walk) -> None:
    cpu = torch.device("cpu")
    devices = {name: cpu for name, _ in walk.model.named_children()} | {"": cpu}
    attach_align_device_hook_on_blocks(walk.model, execution_device=devices)


def _pickle(walk: Walk) -> None:
    if any("_hf_hook" in module.__dict__ for module in walk.model.modules()):
        return  # accelerate's forwards are local functions, which pickle does not take
    walk.model = pickle.loads(pickle.dumps(walk.model))


ACTIONS = {
    "patch": _patch,
    "patch again": _patch,
    "unpatch": _unpatch,
    "merge": lambda walk: fused_lora.merge(walk.model),
    "unmerge": lambda walk: fused_lora.unmerge(walk.model),
    "merge and back": _merge_and_back,
    "disable": _disable,
    "save": _save,
    "load": _load,
    "checkpoint": _checkpoint,
    "resume": _resume,
    "deepcopy": _replace(copy.deepcopy),
    "pickle": _pickle,
    "compile": _compile,
    "call the compiled": _call_the_compiled,
    "dispatch": _dispatch,
    "take the dispatch off": lambda walk: remove_hook_from_submodules(walk.model),
    "double": _to(torch.float64),
    "float": _to(torch.float32),
    "through meta": _through_meta,
    "train": lambda walk: walk.model.train() and None,
    "eval": lambda walk: walk.model.eval() and None,
    "prune": _prune,
    "prune for good": _prune_for_good,
    "hook": _hook,
    "freeze": _freeze,
    "freeze the base": _freeze_all,
}
