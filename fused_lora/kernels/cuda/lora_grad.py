"""RANK gradients of all groups from one read of x and dy; see csrc/lora_grad/.

    h = x aT   dh_g = s_g dy[:, span_g] b_g     formed on chip and rounded as x is, or given
    db_g = s_g dy[:, span_g]T h_g   da_g = dh_gT x   dbias = sum over rows of dy

Products are of bf16, of fp16, or of fp32 rounded to TF32 where torch allows that. Sums are fp32,
dbias that of dy as it is; each gradient is rounded once, to its tensor's dtype. No atomics. A pass
leaves the sums of slices of its rows, or of clusters of slices; a second launch adds them up, in a
program those of several passes (``add_slices``). What is formed on chip must fit the registers of a
block, or of a cluster (``fits``); with h and dh given, any width does. Of 16 bits x may be GELU(u),
or a LayerNorm, formed on chip from the u or z that is given in its place and rounded once, as
whoever made it in forward did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_lora.kernels.cuda import native
from fused_lora.kernels.cuda.lora_grad_shape import (
    ADAPTERS,
    LARGE,
    RANK_BLOCK,
    GradCall,
    GradShape,
)
from fused_lora.kernels.cuda.native import Chip
from fused_lora.kernels.interface import Adapters, Grads, InputNorm
from fused_lora.programs.record import opaque
from fused_lora.types import Needs

NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in ADAPTERS}
Into = tuple[Sequence[Tensor], Sequence[Tensor]]  # G of [R_g, K], G of [N_g, R_g]; any strides


class Sums(NamedTuple):
    """What ``add_slices`` is given."""

    partial: Tensor
    k: int
    n: int
    adapters: Adapters
    grads: Grads
    add: bool = False

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What a launch takes of it, in order."""
        return (self.partial, self.grads.bias, *self.grads.a, *self.grads.b)


def fits(k: int, n: int, ranks: int, arch: int, given: bool = False, tf32: bool = False) -> bool:
    """Whether a block of architecture ``arch`` (80, 90, ...) holds all gradients of this size."""
    shape = GradShape(k, n, ranks, h_given=given, dh_given=given, tf32=tf32)
    return shape.form(Chip(arch, 1)) is not None


def why_not(
    x: Tensor | None,
    dy: Tensor | None,
    adapters: Adapters,
    needs: Needs,
    h: Tensor | None = None,
    dh: Tensor | None = None,
    writes_dh: bool = False,  # ``dh_out`` is given
) -> str | None:
    """One sentence why ``lora_grads`` cannot serve these operands; None when it can."""
    call = GradCall(x, dy, adapters, needs, h, dh, writes_dh)
    device = call.first.device
    if not call.first.is_cuda:
        return native.why_not() or f"the operands lie on {device}"
    return native.why_not(device) or call.why_not(Chip.of(device))


def lora_grads(
    x: Tensor | None,  # [M, K], rows contiguous, 16-byte aligned; None where nothing reads it
    dy: Tensor | None,  # [M, N], likewise
    adapters: Adapters,
    needs: Needs,
    h: Tensor | None = None,  # [M, sum R], rows contiguous; formed where needed and not given
    dh: Tensor | None = None,  # [M, sum R], likewise
    into: Into | None = None,  # da and db go here
    chip: Chip | None = None,
    beta: int = 1,  # times what ``into`` holds; 0 never reads it
    dh_out: Tensor | None = None,  # [M, sum R], dy's dtype, rows contiguous: dh goes here too
    activation: str = "none",  # erf or tanh: ``x`` is the u of x = GELU(u)
    add_up: Callable[[Sums], None] | None = None,  # of the slices; now, where it is not given
    norm: InputNorm | None = None,  # ``x`` is the z of x = (z - mean) rstd gamma + beta
) -> Grads:
    """da, db and dbias as ``needs`` names them, in their operands' dtypes or ``into`` others.

    ``dh_out`` is for a dh that is formed here, which is then whether or not ``needs.a``.
    """
    call = GradCall(x, dy, adapters, needs, h, dh, writes_dh=dh_out is not None)
    chip = chip or Chip.of(call.first.device)
    reason = call.why_not_operands() or call.why_not_written(dh_out)
    reason = reason or call.why_not_activated(activation) or call.why_not_normed(norm)
    assert reason is None, reason
    assert norm is None or activation == "none", activation
    plan = call.plan(chip)
    assert plan is not None, call.too_large(chip)
    grads = _outputs(call, into)
    if dh_out is None and all(grad is None for grad in (grads.bias, *grads.a, *grads.b)):
        return grads
    assert beta in (0, 1), beta
    sizes = plan.partials, plan.columns, RANK_BLOCK * plan.rank_blocks
    partial = call.first.new_empty(sizes, dtype=torch.float32)
    launch = GradLaunch(call, plan, dh_out, activation, norm)
    written = [partial] if dh_out is None else [partial, dh_out]
    opaque(launch, lambda *_: None, *launch.tensors(call, dh_out, partial, norm), writes=written)
    k, n = (size if strips else 0 for size, strips in zip(call.shape[:2], plan.strips, strict=True))
    sums = Sums(partial, k, n, adapters, grads, add=into is not None and beta == 1)
    if add_up is None:
        add_slices(*sums)
    else:
        add_up(sums)
    return grads


class GradLaunch:
    """One pass but for its tensors, whose layouts are packed once: done now, and by programs."""

    __name__ = "lora_grad"
    launches = 1
    by_address = True  # strides are bound

    def __init__(
        self,
        call: GradCall,
        plan: Any,
        dh_out: Tensor | None,
        activation: str,
        norm: InputNorm | None,
    ) -> None:
        module, first = native.load(), call.first
        assert first.is_cuda or module.archs == "none", first.device
        self.device = first.device
        vectors = [t for t in (norm[2:] if norm else ()) if t is not None]
        self._bound = module.BoundGrad(
            plan=plan,
            **{f"{name}_row": _row(getattr(call, name)) for name in ("x", "dy", "h", "dh")},
            groups=[
                module.GradGroup(a_strides=a.stride(), b_strides=b.stride(), **of_group)
                for a, b, of_group in zip(*call.adapters[:2], _places(call.adapters), strict=True)
            ],
            dh_out_row=_row(dh_out),
            rows=first.shape[0],
            type=_dtype(first),
            adapter=_dtype(call.adapters.a[0]),
            activation=getattr(module.Activation, activation),
            norm=_dtype(vectors[0]) if vectors else module.DType.float32,
        )

    @staticmethod
    def tensors(
        call: GradCall, dh_out: Tensor | None, partial: Tensor, norm: InputNorm | None
    ) -> list[Tensor | None]:
        """What a call takes, in order."""
        own = (call.x, call.dy, call.h, call.dh, dh_out, partial, *(norm or (None,) * 4))
        return [*own, *call.adapters.a, *call.adapters.b]

    def __call__(self, *tensors: Tensor | None) -> None:
        """On the current stream."""
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        self._bound(addresses, *native.queue(self.device))


def add_slices(
    partial: Tensor,  # fp32 [slices, 16 ceil(k/16) + 16 ceil(n/16), 16 rank blocks], contiguous
    k: int,  # columns of x that it begins with; 0 where there are none
    n: int,  # columns of dy that follow; likewise
    adapters: Adapters,
    grads: Grads,  # da, db and dbias: written, or None
    add: bool = False,  # to what da and db hold
) -> None:
    """Gradients from the sums that a kernel left of each slice of its rows.

    Element [slice, c, r] is a part of da_g[r - first rank of g, c], and of column c of dy a part of
    db_g[c - start of span g, r - first rank of g] before its scale s_g; rank ``adapters.rank`` of
    dy's columns is a part of dbias. da and db have any strides and one dtype of fp32, bf16 and
    fp16, dbias [n] another. Slices are added in a fixed order, in fp32, and rounded once. What
    belongs to no gradient that is asked for may hold anything: it is not read.

    Raises:
        ValueError: sizes, dtypes, devices or layouts do not match.
    """
    sums = Sums(partial, k, n, adapters, grads, add)
    reason = _why_not_sums(sums)
    if reason is not None:
        raise ValueError(f"add_slices: {reason}")
    if written := [grad for grad in sums.tensors[1:] if grad is not None]:
        opaque(GradSums.of(sums), lambda _: None, sums.tensors, writes=written)


class GradSums:
    """The sums of one or several passes as one launch, bound but for their tensors."""

    __name__ = "add_partials"
    launches = 1
    by_address = True
    waits = True  # a program may have those of several passes as one

    def __init__(self, pieces: list[Any], device: torch.device) -> None:
        module = native.load()
        assert device.type == "cuda" or module.archs == "none", device
        self.pieces, self.device = pieces, device  # fused_lora._native.SumPiece each
        self.kind = self.__name__, device
        self._bound = module.BoundSums(pieces)

    @classmethod
    def of(cls, sums: Sums) -> GradSums:
        """Those of one pass."""
        module, partial, grads = native.load(), sums.partial, sums.grads
        of_adapters = [grad for grad in (*grads.a, *grads.b) if grad is not None]
        piece = module.SumPiece(
            **dict(slices=partial.shape[0], k=sums.k, n=sums.n, add=sums.add),
            rank_blocks=partial.shape[2] // RANK_BLOCK,
            groups=[
                module.SumGroup(
                    da_strides=(0, 0) if da is None else da.stride(),
                    db_strides=(0, 0) if db is None else db.stride(),
                    **of_group,
                )
                for da, db, of_group in zip(grads.a, grads.b, _places(sums.adapters), strict=True)
            ],
            grad=_dtype(of_adapters[0] if of_adapters else partial),
            dbias_type=_dtype(partial if grads.bias is None else grads.bias),
        )
        return cls([piece], partial.device)

    def joined(self, others: Sequence[GradSums]) -> GradSums | None:
        """All of them as one; None where those are too many."""
        pieces = [piece for each in (self, *others) for piece in each.pieces]
        if len(pieces) > native.load().sum_most_pieces:
            return None
        return GradSums(pieces, self.device)

    def __call__(self, tensors: tuple[Tensor | None, ...]) -> None:
        """On the current stream; of each pass its partial sums, dbias, every da and every db."""
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        self._bound(addresses, *native.queue(self.device))


def a_grads(
    dh: Tensor,  # [M, sum R], rows contiguous
    x: Tensor,  # [M, K], rows contiguous, 16-byte aligned
    adapters: Adapters,
    into: Sequence[Tensor] | None = None,  # G of [R_g, K], any strides: add to these
    chip: Chip | None = None,
) -> list[Tensor | None]:
    """da_g = dh_gT x, in a's dtype or added ``into`` given tensors."""
    both = None if into is None else (into, ())
    return lora_grads(x, None, adapters, Needs(b=False), dh=dh, into=both, chip=chip).a


def b_grads(
    h: Tensor,  # [M, sum R], rows contiguous
    dy: Tensor,  # [M, N], rows contiguous, 16-byte aligned
    adapters: Adapters,
    into: Sequence[Tensor] | None = None,  # G of [N_g, R_g], any strides: add to these
    chip: Chip | None = None,
) -> list[Tensor | None]:
    """db_g = s_g dy[:, span_g]T h_g, in b's dtype or added ``into`` given tensors."""
    both = None if into is None else ((), into)
    return lora_grads(None, dy, adapters, Needs(a=False), h=h, into=both, chip=chip).b


def _outputs(call: GradCall, into: Into | None) -> Grads:
    """Tensors for what is needed; None for the rest."""
    nothing: list[Tensor | None] = [None] * len(call.adapters.spans)
    a, b = into or ([torch.empty_like(t) for t in halves] for halves in call.adapters[:2])
    assert call.dy is not None or not call.needs.bias
    bias = call.dy.new_empty(call.dy.shape[1]) if call.needs.bias and call.dy is not None else None
    return Grads(
        None, None, bias, list(a) if call.needs.a else nothing, list(b) if call.needs.b else nothing
    )


def _places(adapters: Adapters) -> list[dict[str, Any]]:
    """Of each adapter, its columns of dy, its ranks and its scale, as the module names them."""
    firsts = accumulate((span.rank for span in adapters.spans), initial=0)
    return [
        dict(
            **dict(first_column=span.start, columns=span.width, scale=scale),
            **dict(first_rank=first, rank=span.rank),
        )
        for span, scale, first in zip(adapters.spans, adapters.scales, firsts, strict=False)
    ]


def _why_not_sums(sums: Sums) -> str | None:
    """One sentence why these sums cannot be added up to these gradients; None when they can."""
    partial, k, n, adapters, grads, _ = sums
    spans, most = adapters.spans, native.load().grad_most_groups
    if not 1 <= len(spans) <= most:
        return f"{len(spans)} adapters share these sums; 1 to {most} are served"
    counts = [len(each) for each in (adapters.scales, grads.a, grads.b)]
    if counts != [len(spans)] * 3:
        return f"{len(spans)} adapters have {counts} scales, da and db, None where one is not asked"
    if k < 0 or n < 0 or any(span.start < 0 for span in spans):
        return f"k {k}, n {n} and the starts of {[*spans]} must not be negative"
    ranks = adapters.rank + (grads.bias is not None)
    columns = sum(-(-size // RANK_BLOCK) * RANK_BLOCK for size in (k, n))
    shape = tuple(partial.shape)
    fits = len(shape) == 3 and shape[1] == columns and shape[2] % RANK_BLOCK == 0
    if not (fits and shape[2] >= ranks and partial.dtype is torch.float32):
        return (
            f"the sums are float32 [slices, {columns}, a multiple of {RANK_BLOCK} from {ranks} on] "
            f"for {k} columns of x and {n} of dy, got {partial.dtype} {shape}"
        )
    if not partial.is_contiguous():
        return f"the sums must be contiguous, got strides {partial.stride()} of {shape}"
    wanted: list[tuple[str, Tensor | None, tuple[int, ...]]] = [("dbias", grads.bias, (n,))]
    for g, (da, db, span) in enumerate(zip(grads.a, grads.b, spans, strict=True)):
        wanted += [(f"da {g}", da, (span.rank, k)), (f"db {g}", db, (span.width, span.rank))]
        if db is not None and span.stop > n:
            return f"db {g} is of columns {span.start} to {span.stop} of dy, which has {n}"
    for name, grad, size in wanted:
        if grad is not None and (tuple(grad.shape) != size or grad.device != partial.device):
            seen = f"{tuple(grad.shape)} on {grad.device}"
            return f"{name} must be {size} on {partial.device}, got {seen}"
    if grads.bias is not None and not grads.bias.is_contiguous():
        return f"dbias must be contiguous, got strides {grads.bias.stride()}"
    dtypes = {grad.dtype for grad in (*grads.a, *grads.b) if grad is not None}
    if len(dtypes) > 1 or not dtypes <= {*ADAPTERS}:
        return f"da and db must have one dtype of {_list(ADAPTERS)}, got {_list(dtypes)}"
    if grads.bias is not None and grads.bias.dtype not in LARGE:
        return f"dbias must be one of {_list(LARGE)}, got {grads.bias.dtype}"
    return None


def _list(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(sorted(map(str, dtypes)))


def _row(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


def _dtype(tensor: Tensor) -> Any:
    return getattr(native.load().DType, NAMES[tensor.dtype])
