"""A half of a block as a place that calls: its modules watched, its program remembered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fused_lora.nn import block_parts as parts
from fused_lora.nn.watch import Watch
from fused_lora.ops.dropped import seeded
from fused_lora.programs.run import Memo, program_of, run

NOTHING = (None,) * 5
MASK = 3  # where drop path's factor stands among the inputs of a chain


class Half(Memo):
    """Calls one half of a block; what kind of half is told by what derives from this."""

    __slots__ = ("watch",)
    weight = 6  # where the first projection's weight stands among the inputs

    def __init__(self) -> None:
        super().__init__()
        self.watch: Watch | None = None

    def __call__(self, block: Any, x: Tensor) -> Tensor:
        """y of x: by a program, by operations of which each has one, or by the modules."""
        watch = self.watch
        if watch is None or not watch.intact():
            if self.why_not(block):
                return self.by_modules(block, x)
            self.watch, self.last = Watch(self.watched(block)), NOTHING
        state, inputs, drop, held = self.gather(block, x)
        key, operation, program = self.recall(state, inputs, held)
        known = program is not None
        if not known:
            if self.why_not(block) or parts.why_not_input(x, inputs[self.weight]):
                self.watch = None
                return self.by_modules(block, x)
            operation = self.choose(block, x)
        if operation is None:
            self.keep(key, None, "several operations")
            return self.by_parts(block, x)
        if operation.seeds:
            inputs = seeded(operation, inputs)
        if drop is not None:
            inputs[MASK] = parts.mask_of(drop, x, inputs[2])
        if not known:
            program = program_of(operation, inputs)
            self.keep(key, operation, program)
        return run(program, operation, inputs)  # type: ignore[no-any-return]

    def watched(self, block: Any) -> Sequence[nn.Module]:
        """The modules that are stood in for."""
        raise NotImplementedError

    def why_not(self, block: Any) -> str | None:
        """One sentence why the half goes through its modules at present."""
        raise NotImplementedError

    def gather(self, block: Any, x: Tensor) -> tuple[tuple[Any, ...], list[Any], Any, bool]:
        """What beside tensors decides, the inputs of the chain, the drop path to draw from, and
        whether the inputs behind x are held by their modules."""
        raise NotImplementedError

    def choose(self, block: Any, x: Tensor) -> Any:
        """The one operation that the half is; None where it is several."""
        raise NotImplementedError

    def by_parts(self, block: Any, x: Tensor) -> Tensor:
        """By several operations."""
        raise NotImplementedError

    def by_modules(self, block: Any, x: Tensor) -> Tensor:
        """As the class of the block has it."""
        raise NotImplementedError
