"""The methods of adaptation: frozen, full, naive LoRA, addmm, PEFT, this library."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from fused_lora.bench.registry import METHODS, Method, register
from fused_lora.bench.workload import blocks, projections, thirds


def let_gradient_in(module: nn.Module, args: tuple[Any, ...], tokens: Tensor) -> None:
    """A forward hook of the embedding: its output asks for a gradient."""
    tokens.requires_grad_()


@register
class Frozen(Method):
    """The floor: no weight trains, yet the gradient still crosses every block.

    Training adapters always costs this crossing. The embedded tokens ask for a gradient, so
    block 0 computes one as well, which the adapted networks can skip: the floor is a hair high.
    """

    name, title, form = "frozen", "frozen network", "none"

    def install(self, model: nn.Module, rank: int) -> nn.Module:
        """Only open the way for the gradient; ``rank`` is not used."""
        if isinstance(embed := getattr(model, "patch_embed", None), nn.Module):
            embed.register_forward_hook(let_gradient_in)
        return model


@register
class Full(Method):
    """Full fine-tuning: every weight of the network trains."""

    name, title, form, owns_weights = "full", "full fine-tuning", "none", True

    def install(self, model: nn.Module, rank: int) -> nn.Module:
        """Unfreeze; ``rank`` is not used."""
        return model.requires_grad_(True)


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` where ``model`` has the submodule called ``name``."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


class NaiveLinear(nn.Module):
    """``y = base(x) + B(A(x))``."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        like = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.base = base
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, **like)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, **like)

    def forward(self, x: Tensor) -> Tensor:
        """The frozen output plus the low-rank one."""
        return self.base(x) + self.lora_B(self.lora_A(x))


class NaiveQKV(nn.Module):
    """Three pairs on a fused qkv, each added in place to its third of the frozen output.

    The sliced ``+=`` is what public implementations of LoRA for timm vision transformers do.
    """

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        like = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.base = base
        self.spans = thirds(base)
        for third, (start, stop) in self.spans.items():
            a = nn.Linear(base.in_features, rank, bias=False, **like)
            b = nn.Linear(rank, stop - start, bias=False, **like)
            self.add_module(f"lora_A_{third}", a)
            self.add_module(f"lora_B_{third}", b)

    def forward(self, x: Tensor) -> Tensor:
        """The frozen qkv with one low-rank output added to each third."""
        y = self.base(x)
        for third, (start, stop) in self.spans.items():
            a, b = getattr(self, f"lora_A_{third}"), getattr(self, f"lora_B_{third}")
            y[..., start:stop] += b(a(x))
        return y


@register
class Naive(Method):
    """The reference method of the papers: q, k and v adapted separately."""

    name, title = "naive", "naive LoRA"

    def install(self, model: nn.Module, rank: int) -> nn.Module:
        """Wrap every projection, three pairs on a fused qkv unless the form is joint."""
        with torch.random.fork_rng(devices=[]):  # the values are overwritten before any use
            for name, linear in projections(model).items():
                split = name.endswith("qkv") and self.form == "separate"
                replace(model, name, (NaiveQKV if split else NaiveLinear)(linear, rank))
        return model


@register
class NaiveJoint(Naive):
    """The same with one pair on a fused qkv."""

    name, title, form = "naive_joint", "naive LoRA (joint)", "joint"


# What a careful user writes by hand: the expand accumulates into the frozen output.
#
# forward   h = x aT,  y = x wT + bias,  y += h bT           y in place, one pass over it saved
# backward  dh = dy b, dx = dy w,  dx += dh a,  db = dyT h,  da = dhT x


Spans = tuple[tuple[int, int], ...]  # columns of y, one range for each adapter


class AddmmLoRA(torch.autograd.Function):
    """One frozen linear and its adapters over flattened rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor, spans: Spans, *ab: Tensor) -> Tensor:
        """Returns y [M, N] of x [M, K], w [N, K], bias [N] and the pairs a [R, K], b [N_g, R]."""
        y = torch.addmm(bias, x, w.t())
        hidden = []
        for (start, stop), a, b in zip(spans, ab[::2], ab[1::2], strict=True):
            hidden.append(x @ a.t())  # [M, R]
            y[:, start:stop].addmm_(hidden[-1], b.t())
        ctx.spans = spans
        ctx.save_for_backward(x, w, *ab, *hidden)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Returns dx and the pairs da, db."""
        x, w, *rest = ctx.saved_tensors
        pairs, hidden = rest[: 2 * len(ctx.spans)], rest[2 * len(ctx.spans) :]
        dx = dy @ w if ctx.needs_input_grad[0] else None
        grads = []
        for (start, stop), a, b, h in zip(ctx.spans, pairs[::2], pairs[1::2], hidden, strict=True):
            dy_g = dy[:, start:stop]
            dh = dy_g @ b
            if dx is not None:
                dx.addmm_(dh, a)
            grads += [dh.t() @ x, dy_g.t() @ h]
        return dx, None, None, None, *grads


class AddmmLinear(nn.Module):
    """A projection that runs AddmmLoRA, its adapters named as everywhere."""

    def __init__(self, base: nn.Linear, spans: dict[str, tuple[int, int]], rank: int) -> None:
        super().__init__()
        self.base, self.spans, self.names = base, tuple(spans.values()), []
        for suffix, (start, stop) in spans.items():
            for letter, shape in ("A", (rank, base.in_features)), ("B", (stop - start, rank)):
                self.names.append(f"lora_{letter}{suffix}")
                value = nn.Parameter(base.weight.new_zeros(shape))
                self.register_parameter(self.names[-1], value)

    def forward(self, x: Tensor) -> Tensor:
        """The adapted output, in the autocast dtype where autocast is on."""
        device, dtype = x.device.type, x.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        operands = (self.base.weight, self.base.bias, *(getattr(self, n) for n in self.names))
        w, bias, *ab = (operand.to(dtype) for operand in operands)
        with torch.autocast(device, enabled=False):
            y = AddmmLoRA.apply(x.to(dtype).flatten(0, -2), w, bias, self.spans, *ab)
        return y.unflatten(0, x.shape[:-1])


@register
class Addmm(Method):
    """In-place composition of library GEMMs, q, k and v adapted separately."""

    name, title = "addmm", "addmm_ by hand"

    def install(self, model: nn.Module, rank: int) -> nn.Module:
        """Wrap every projection."""
        for name, linear in projections(model).items():
            spans = {f"_{third}": span for third, span in thirds(linear).items()}
            whole = {"": (0, linear.out_features)}
            spans = spans if name.endswith("qkv") else whole
            replace(model, name, AddmmLinear(linear, spans, rank))
        return model


@register
class Peft(Method):
    """``peft.get_peft_model`` as its documentation has it, with a scale of 1."""

    name, title, form = "peft", "PEFT", "joint"
    widen = True  # autocast_adapter_dtype: 16-bit adapters are made fp32

    def why_not(self, dtype: str) -> str | None:
        """PEFT is an optional package."""
        return super().why_not(dtype) if find_spec("peft") else "peft is not installed"

    def install(self, model: nn.Module, rank: int) -> nn.Module:
        """Wrap ``model``; targets are full names, so patch_embed.proj is never among them."""
        import peft

        config = peft.LoraConfig(
            r=rank,
            lora_alpha=rank,
            lora_dropout=0.0,
            bias="none",
            target_modules=list(projections(model)),
        )
        return peft.get_peft_model(model, config, autocast_adapter_dtype=self.widen)


@register
class PeftBf16(Peft):
    """PEFT with adapters kept in bf16; the base is bf16 too unless autocast is on."""

    name, title = "peft_bf16", "PEFT, bf16 adapters"
    widen, dtypes = False, ("bf16", "amp")

    def install(self, model: nn.Module, rank: int) -> nn.Module:
        """Wrap ``model``, then store the adapters in bf16."""
        wrapped = super().install(model, rank)
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
        return wrapped


@register
class PeftCheckpoint(Peft):
    """PEFT with every block inside ``torch.utils.checkpoint``, which keeps the block's input."""

    name, title = "peft_checkpoint", "PEFT, checkpointed"

    def install(self, model: nn.Module, rank: int) -> nn.Module:
        """Wrap ``model``, then the forward of its blocks; the embedding lets the gradient in."""
        wrapped = super().install(model, rank)
        if isinstance(embed := getattr(model, "patch_embed", None), nn.Module):
            embed.register_forward_hook(let_gradient_in)
        for block in blocks(wrapped):
            block.forward = partial(checkpoint, block.forward, use_reentrant=True)
        return wrapped


class FusedLoRA(Method):
    """``fused_lora.patch`` on a model; on a set of layers, its modules one by one.

    Attributes:
        level, recompute: The choices of ``patch`` that tell these methods apart.
    """

    ours = True

    def __init__(
        self,
        name: str,
        title: str,
        form: str = "separate",
        level: str = "linear",
        recompute: str | None = None,
    ) -> None:
        self.name, self.title, self.form = name, title, form
        self.level, self.recompute = level, recompute

    def install(self, model: nn.Module, rank: int) -> nn.Module:
        """Adapt every projection; adapters are fp32 by default."""
        if hasattr(model, "blocks"):
            import fused_lora

            choice = {"qkv": self.form, "level": self.level, "recompute": self.recompute}
            fused_lora.patch(model, rank, scale=1.0, allow_large_rank=True, **choice)  # type: ignore[arg-type]
            return model
        from fused_lora.nn import FusedLoRAGroupedLinear, FusedLoRALinear

        for name, linear in projections(model).items():
            if name.endswith("qkv") and self.form == "separate":
                FusedLoRAGroupedLinear.adopt(linear, spans=thirds(linear), rank=rank, scale=1.0)
            else:
                FusedLoRALinear.adopt(linear, rank=rank, scale=1.0)
        return model


for _method in (
    FusedLoRA("fused", "fused_lora"),
    FusedLoRA("fused_joint", "fused_lora (joint)", "joint"),  # as PEFT has it
    FusedLoRA("fused_block", "fused_lora (block)", "separate", "block", "elementwise"),
    FusedLoRA("fused_block_joint", "fused_lora (block, joint)", "joint", "block", "elementwise"),
    FusedLoRA("fused_block_none", "fused_lora (block, keeps all)", "separate", "block", "none"),
    FusedLoRA("fused_block_gemm", "fused_lora (recompute gemm)", "separate", "block", "gemm"),
):
    METHODS[_method.name] = _method
