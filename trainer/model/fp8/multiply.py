"""`left @ right.T` of two quantised matrices: emulated on any device, or on the device's FP8 units."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F

from trainer.model.fp8.quantize import Quantized, dequantize

_STEP = 16
"""FP8 units take contractions and widths that are a multiple of this."""


class Multiply(Protocol):
    """left [m, k], right [n, k] -> [m, n] in the format `dtype`."""

    def __call__(self, left: Quantized, right: Quantized, dtype: torch.dtype, *, is_forward: bool) -> torch.Tensor: ...


def multiply_emulated(left: Quantized, right: Quantized, dtype: torch.dtype, *, is_forward: bool) -> torch.Tensor:
    """Multiply the numbers that the FP8 ones stand for, in the result's format; only the order of summation differs."""
    return dequantize(left, dtype) @ dequantize(right, dtype).t()


def multiply_scaled(left: Quantized, right: Quantized, dtype: torch.dtype, *, is_forward: bool) -> torch.Tensor:
    """Multiply on FP8 units through `torch._scaled_mm`, for scales by tensor or by row.

    A contraction over tokens may have any length: it is filled up with zeros. The forward pass uses Hopper's faster
    accumulator of 14 bits, gradients the full one, as Transformer Engine does.
    """
    num_missing = -left.data.shape[1] % _STEP
    operands = [left.data, right.data]
    if num_missing:
        operands = [F.pad(data.view(torch.uint8), (0, num_missing)).view(data.dtype) for data in operands]
    return torch._scaled_mm(
        operands[0],
        operands[1].t(),
        scale_a=left.inverse_scale,
        scale_b=right.inverse_scale.t(),
        out_dtype=dtype,
        use_fast_accum=is_forward,
    )


MULTIPLIES: dict[str, Multiply] = {"emulated": multiply_emulated, "torch": multiply_scaled}
