"""Adapters on a convolution's kernel: w' = w + s b a at every read, plainly, as its child.

    w' = w + s (b a)        a [R, C k]   b [N, R]   w [N, C, ...], k the size of its window

Convolutions are adapted where a LoraConfig names one, as PEFT's ``"proj"`` names the patch
embedding. The kernel is small beside the images it slides over; nothing is fused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from fused_lora.nn.bare import FusedLoRAChild
from fused_lora.nn.stand_in import own_tensor, why_not_stood_in
from fused_lora.nn.weight_read import watched

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class FusedLoRAKernel(FusedLoRAChild):
    """a and b of a convolution, whose ``weight`` reads w'; the convolution stays what it is."""

    @classmethod
    def attach(  # type: ignore[override]
        cls, owner: nn.Module, rank: int, **options: Any
    ) -> FusedLoRAKernel:
        """Adapt the kernel of ``owner``; options are those of ``AdapterConfig``.

        Raises:
            TypeError: a convolution that cannot be, with the reason.
        """
        if why := why_not_kernel(owner):
            raise TypeError(f"the convolution to adapt: {why}")
        columns: Mapping[str, tuple[int, int]] = {"": (0, len(owner._parameters["weight"]))}  # type: ignore[arg-type]
        return cast(
            FusedLoRAKernel, super().attach(owner, "weight", columns, {"": rank}, **options)
        )

    @property
    def base(self) -> Tensor:
        """The frozen kernel as a matrix, [N, C k]."""
        return self._whole().flatten(1)

    def _whole(self) -> Tensor:
        return own_tensor(*self.__dict__["_home"])

    def _frozen(self) -> Tensor:
        return self._base[0].flatten(1) if self._base else self.base

    def _put_base(self, weight: Tensor) -> None:
        whole = self._whole()
        if weight.dim() != whole.dim():
            weight = nn.Parameter(weight.detach().view_as(whole), requires_grad=False)
        super()._put_base(weight)

    def _take_merged(self, merged: Tensor) -> None:
        self._base = (self._whole(),)
        self._put_base(merged)

    def read(self, base: Tensor) -> Tensor:
        """w' in the kernel's shape."""
        if not self.adapter_enabled or self._base:
            return super().read(base)
        return watched(self._formed(base.flatten(1)).view_as(base), base)


def is_convolution(module: nn.Module) -> bool:
    """Whether it is one of torch's, adapted or not."""
    return isinstance(module, CONVOLUTIONS)


def why_not_kernel(conv: nn.Module) -> str | None:
    """Why PEFT's adapter of a convolution cannot be put into its kernel; None where it can."""
    if type(conv) not in CONVOLUTIONS:
        return f"a {type(conv).__name__}, no plain convolution of torch's"
    assert isinstance(conv, CONVOLUTIONS)
    if conv.groups != 1:
        return f"a {type(conv).__name__} of {conv.groups} groups"
    if any(step != 1 for step in conv.dilation) or conv.padding_mode != "zeros":
        return "dilation or padding that PEFT's adapter of it would not have"
    return why_not_stood_in(conv)
