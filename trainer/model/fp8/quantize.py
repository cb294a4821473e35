"""Numbers in blocks that share a scale: the arithmetic of every FP8 recipe, on any device.

One rule for all of them: a block's scale is the largest power of two that keeps its largest value within the format's
range. That is the rule of MXFP8 (arXiv:2506.08027) and of blockwise scaling; for whole tensors it costs at most one of
FP8's 18 or 32 binades, makes scaling itself exact, and makes the result nearly independent of what shares a scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from configs.fp8 import Block

FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
_EXPONENT_BITS = 0x7F800000
_LARGEST_SCALE = 2.0**126  # its inverse is still a normal fp32 number


@dataclass(frozen=True)
class Quantized:
    """A matrix in FP8 whose elements stand for `data * inverse_scale`."""

    data: torch.Tensor  # [rows, columns], FP8
    inverse_scale: torch.Tensor  # [blocks of rows, blocks of columns], fp32
    block: Block


def compute_amax(matrix: torch.Tensor, block: Block) -> torch.Tensor:
    """Return the largest absolute value of each block of `matrix [rows, columns]`, fp32, by block."""
    num_rows, num_columns = matrix.shape
    rows, columns = block[0] or num_rows, block[1] or num_columns
    if (rows, columns) == (num_rows, num_columns):
        return torch.linalg.vector_norm(matrix, ord=torch.inf).float().view(1, 1)
    if (rows, columns) == (1, num_columns):
        return torch.linalg.vector_norm(matrix, ord=torch.inf, dim=1, keepdim=True).float()
    padded = F.pad(matrix, (0, -num_columns % columns, 0, -num_rows % rows))
    blocks = padded.unflatten(0, (-1, rows)).unflatten(2, (-1, columns))
    return blocks.abs().amax(dim=(1, 3)).float()


def compute_scale(amax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the largest power of two that keeps `amax` in the format's range; NaN where `amax` is not finite.

    So an infinity is never silently cut to the largest number: it makes its block NaN, and the step is skipped.
    """
    ratio = (torch.finfo(dtype).max / amax).clamp(max=_LARGEST_SCALE)
    power = (ratio.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)
    scale = torch.where(amax > 0, power, torch.ones_like(power))
    return torch.where(torch.isfinite(amax), scale, torch.full_like(scale, torch.nan))


def quantize(matrix: torch.Tensor, scale: torch.Tensor, block: Block, dtype: torch.dtype) -> Quantized:
    """Return `matrix [rows, columns]` in FP8, rounded to nearest even, cut to the format's range."""
    largest = torch.finfo(dtype).max
    scaled = matrix.float() * spread(scale, block, matrix.shape)
    return Quantized(scaled.clamp(-largest, largest).to(dtype), scale.reciprocal(), block)


def dequantize(quantized: Quantized, dtype: torch.dtype) -> torch.Tensor:
    """Return the numbers that the FP8 ones stand for, exactly: bf16 and fp32 hold each of them."""
    data = quantized.data
    return (data.float() * spread(quantized.inverse_scale, quantized.block, data.shape)).to(dtype)


def spread(scale: torch.Tensor, block: Block, shape: torch.Size) -> torch.Tensor:
    """Return one scale for each element, or a shape that broadcasts to it."""
    for dim, size in enumerate(block):
        if size is not None and size > 1:
            scale = scale.repeat_interleave(size, dim=dim).narrow(dim, 0, shape[dim])
    return scale
