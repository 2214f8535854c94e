"""The contenders; importing this room registers them all, in the order reports show them."""

from fused_lora.bench.contenders import (  # noqa: I001  the order is the order of columns
    frozen as frozen,
    naive as naive,
    addmm as addmm,
    peft as peft,
    fused as fused,
)
