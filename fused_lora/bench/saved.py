"""What a forward pass keeps for the backward pass, counted exactly and on any machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import chain
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fused_lora.bench.clock import Step

OUTSIDE = "outside"  # the section of what no listed block keeps


class SavedBytes:
    """Counts the unique storages that autograd saves inside a ``with`` block.

    Views of one storage count once. The parameters and buffers of ``model``, and the tensors in
    ``excluded`` (the input of the step), live on anyway and do not count.

    Attributes:
        by_section: Bytes by section: the index of the block that first saved the storage.
        fp32_by_section: The part of them in storages first saved as fp32.
        weights_by_section: The part of them that are casts or merges of a parameter, by shape.
    """

    def __init__(
        self,
        model: nn.Module,
        excluded: Iterable[Tensor] = (),
        sections: Iterable[nn.Module] = (),
    ) -> None:
        free = chain(model.parameters(), model.buffers(), excluded)
        self._seen = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in free}
        self._sections = list(sections)
        self._now = OUTSIDE
        self.by_section: Counter[str] = Counter()
        self.fp32_by_section: Counter[str] = Counter()
        self.weights_by_section: Counter[str] = Counter()
        matrices = [p.shape for p in model.parameters() if p.ndim == 2]
        self._shapes = {*matrices, *(shape[::-1] for shape in matrices)}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.by_section.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen[storage.data_ptr()] = storage  # held, so that its address stays taken
            self._count(tensor, storage.nbytes())
        return tensor

    def _count(self, tensor: Tensor, nbytes: int) -> None:
        self.by_section[self._now] += nbytes
        if tensor.dtype is torch.float32:
            self.fp32_by_section[self._now] += nbytes
        if tensor.shape in self._shapes:
            self.weights_by_section[self._now] += nbytes

    def _enter(self, index: int) -> None:
        self._now = str(index)

    def _leave(self) -> None:
        self._now = OUTSIDE

    def __enter__(self) -> SavedBytes:
        self._handles = []
        for i, block in enumerate(self._sections):
            self._handles += [
                block.register_forward_pre_hook(lambda m, a, i=i: self._enter(i)),
                block.register_forward_hook(lambda m, a, o: self._leave()),
            ]
        self._hooks.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._hooks.__exit__(kind, error, trace)
        for handle in self._handles:
            handle.remove()
        self._seen.clear()


class WideCopies(TorchDispatchMode):
    """Counts fp32 copies of 16-bit activations: what fp32 adapters cost when x is cast to them.

    Attributes:
        count: Copies seen.
        nbytes: Bytes of all of them together.
    """

    def __init__(self, min_elements: int) -> None:
        super().__init__()
        self.min_elements = min_elements  # smaller tensors are weights of adapters, not x
        self.count = self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run ``func``; count it when it is a widening copy."""
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.dtype is torch.float32:
            narrow = args[0].dtype in (torch.bfloat16, torch.float16)
            if narrow and out.numel() >= self.min_elements:
                self.count += 1
                self.nbytes += out.nbytes
        return out


def step_peak_bytes(step: Step, device: str) -> int | None:
    """Peak bytes one call of ``step`` allocates beyond what was there; None, uncalled, off CUDA."""
    if not device.startswith("cuda"):
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
