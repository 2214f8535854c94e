"""Triton's interpreter, put right for bf16, tf32 and e4m3, and told what inline assembly means.

As it comes, ``tl.dot`` multiplies the bit patterns of bf16 operands as integers, casts from fp32 to
bf16 truncate, and tf32 products are exact. Here operands become fp32 first, casts round to nearest
even, and tf32 operands lose the 13 bits a matrix unit does not read. Casts from fp32 to e4m3 round
halves up, lose a carry into the exponent (1.94 becomes 1) and wrap beyond 448, and NaN becomes a
number in either direction; here they round to nearest even and stop at 448, as cvt.rn.satfinite.
"""

from __future__ import annotations

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_cast = InterpreterBuilder.cast_impl
_convert = InterpreterBuilder.create_fp_to_fp
ASSEMBLY = {
    "rcp.approx.ftz.f32 $0, $1;": np.reciprocal,
    "mov.b32 $0, $1;": lambda value, like: value,
}
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()


def widened(bits: np.ndarray) -> np.ndarray:
    """bf16 bit patterns as fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrowed(values: np.ndarray) -> np.ndarray:
    """fp32 as bf16 bit patterns, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def quantised(values: np.ndarray) -> np.ndarray:
    """fp32 as e4m3 bit patterns, rounded to nearest even, at most 448; NaN stays NaN."""
    bounded = torch.from_numpy(np.clip(values, -448.0, 448.0).astype(np.float32))
    return bounded.to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def tf32(values: np.ndarray) -> np.ndarray:
    """fp32 with the ten leading fraction bits."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def cast(builder: InterpreterBuilder, src: TensorHandle, dst_type: tl.dtype) -> TensorHandle:
    """Any cast, by way of fp32 where bf16 is at either end."""
    if src.dtype.scalar == tl.bfloat16 and dst_type.scalar != tl.bfloat16:
        src = TensorHandle(widened(src.data), tl.float32)
    if dst_type.scalar == tl.bfloat16 and src.dtype.scalar != tl.bfloat16:
        return TensorHandle(narrowed(src.data.astype(np.float32)), tl.bfloat16)
    return _cast(builder, src, dst_type)


def convert(
    builder: InterpreterBuilder, src: TensorHandle, dst_type: tl.dtype, rounding: object
) -> TensorHandle:
    """Any cast between floats, by way of fp32 where e4m3 is at either end."""
    if src.dtype.scalar == tl.float8e4nv:
        return cast(builder, TensorHandle(E4M3[src.data], tl.float32), dst_type)
    if dst_type.scalar == tl.float8e4nv:
        wide = cast(builder, src, tl.float32)
        return TensorHandle(quantised(wide.data), tl.float8e4nv)
    return _convert(builder, src, dst_type, rounding)


def values_of(operand: TensorHandle) -> np.ndarray:
    """What its bit patterns stand for."""
    if operand.dtype.scalar == tl.float8e4nv:
        return E4M3[operand.data]
    return widened(operand.data) if operand.dtype.scalar == tl.bfloat16 else operand.data


def dot(
    builder: InterpreterBuilder,
    a: TensorHandle,
    b: TensorHandle,
    d: TensorHandle,
    input_precision: object,
    max_num_imprecise_acc: int,
) -> TensorHandle:
    """``a b + d`` in fp32; contiguous, since numpy's order of summation differs by layout."""
    operands = []
    for operand in (a, b):
        values = values_of(operand)
        truncates = values.dtype == np.float32 and "TF32" in str(input_precision).upper()
        operands.append(TensorHandle(tf32(values) if truncates else values, tl.float32))
    return TensorHandle(
        np.matmul(*(o.data.astype(np.float32, order="C") for o in operands)) + d.data,
        d.dtype.scalar,
    )


class Results(list):
    """Of an operation that may have several."""

    get_result = list.__getitem__


def inline_assembly(
    builder: InterpreterBuilder,
    text: str,
    constraints: str,
    values: list[TensorHandle],
    types: list[tl.dtype],
    pure: bool,
    pack: int,
) -> Results:
    """One of ``ASSEMBLY``, of fp32."""
    data = ASSEMBLY[text](*(value.data for value in values))
    return Results([TensorHandle(data, tl.float32)])


def install() -> None:
    """Put it in force in this process."""
    InterpreterBuilder.create_inline_asm = inline_assembly
    InterpreterBuilder.cast_impl = cast
    InterpreterBuilder.create_dot = dot
    InterpreterBuilder.create_fp_to_fp = convert
