"""FusedLoRAConv2d: an adapter on a convolution's kernel, for students that are no transformers.

    w' = w + s (b a), y = conv(x, w')      a [R, C/g kh kw]   b [N, R]   w [N, C/g, kh, kw]

The kernel is small beside the images it slides over, so the sum is made anew in each step: any
stride, padding, dilation and groups are those of the frozen convolution, and no image-sized
tensor is computed or kept for the adapter.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from fused_lora.nn.adapted import check_rank
from fused_lora.nn.graph_tools import Unscripted, as_one_node
from fused_lora.nn.vanilla import settle


class FusedLoRAConv2d(Unscripted, nn.Conv2d):
    """An ``nn.Conv2d`` with one adapter on its kernel; made of a convolution by ``adopt``."""

    scale: float
    rank: int
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    @classmethod
    def adopt(
        cls,
        conv: nn.Conv2d,
        rank: int,
        scale: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> FusedLoRAConv2d:
        """``conv`` itself, from now on with an adapter; its frozen kernel keeps its identity.

        Raises:
            TypeError: ``conv`` is not exactly an ``nn.Conv2d``.
            ValueError: a rank below 1 or above what the kernel can express, a scale not finite.
        """
        if type(conv) is not nn.Conv2d:
            raise TypeError(f"expected a plain torch.nn.Conv2d, got {type(conv).__name__}")
        check_rank(rank, cls.__name__)
        n, k = conv.out_channels, conv.weight[0].numel()
        if rank > min(n, k):
            raise ValueError(f"rank {rank} is above min(channels, kernel) = min({n}, {k})")
        if not math.isfinite(scale):
            raise ValueError(f"scale must be finite, got {scale}")
        wide = torch.promote_types(conv.weight.dtype, torch.float32)
        like = torch.empty(0, device=conv.weight.device, dtype=wide)
        a, b = nn.Parameter(like.new_empty(rank, k)), nn.Parameter(like.new_zeros(n, rank))
        if not a.is_meta:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        conv.weight.requires_grad_(False)
        conv.__class__ = cls
        assert isinstance(conv, cls)
        conv.rank, conv.scale = rank, float(scale)
        conv.lora_A, conv.lora_B = a, b
        return conv

    def kernel(self) -> Tensor:
        """w' in the dtype of w, summed in fp32 or wider and rounded once."""
        with torch.autocast(self.weight.device.type, enabled=False):
            wide = torch.promote_types(self.weight.dtype, self.lora_A.dtype)
            flat = self.weight.flatten(1).to(wide)
            summed = torch.addmm(flat, self.lora_B.to(wide), self.lora_A.to(wide), alpha=self.scale)
            return summed.view_as(self.weight).to(self.weight.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """y [B, N, height', width'] of x [B, C, height, width]."""
        if isinstance(input, Proxy):
            return as_one_node(self, input, input)  # type: ignore[no-any-return]
        return self._conv_forward(input, self.kernel(), self.bias)

    def release(self, merge: bool = False) -> nn.Conv2d:
        """Become a plain ``nn.Conv2d`` again; ``merge`` keeps w', in a parameter of its own."""
        if merge:
            self.weight = nn.Parameter(self.kernel().detach(), requires_grad=False)
        del self.lora_A, self.lora_B, self.rank, self.scale
        self.__class__ = nn.Conv2d  # type: ignore[assignment]
        return self

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """A checkpoint without any adapters loads strictly, as into an adapted linear."""
        missing: list[str] = []
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
        )
        own = [f"{prefix}lora_A", f"{prefix}lora_B"]
        missing_keys += [key for key in missing if key not in own]
        settle(missing_keys, unexpected_keys, own, missing)

    def extra_repr(self) -> str:
        """The convolution's own line, then the adapter's."""
        return f"{super().extra_repr()}, rank={self.rank}, scale={self.scale:g}"
