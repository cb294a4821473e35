"""Weights in FP8 with one scale a block -> the number format of the model, a row of blocks at a time."""

from __future__ import annotations

import torch


def num_blocks(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """Return the shape of the scales of a weight `[rows, columns]`; the last blocks may be smaller."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def dequantise(weight: torch.Tensor, scales: torch.Tensor, block: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Return `weight [rows, columns] * scales [row blocks, column blocks]`, each over its block, in `dtype`.

    The product is taken in fp32 and rounded once more, as in `transformers`' Fp8Dequantize (which takes whole blocks
    only) and in DeepSeek-V3's inference/kernel.py. Peak memory beyond the result is one row of blocks in fp32.
    """
    rows, columns = weight.shape
    result = torch.empty(rows, columns, dtype=dtype)
    values = torch.empty(min(block[0], rows), columns)  # the same memory for every row of blocks: much faster
    for number, scale in enumerate(scales.float()):
        here = slice(number * block[0], min((number + 1) * block[0], rows))
        part = values[: here.stop - here.start].copy_(weight[here])
        result[here] = part.mul_(scale.repeat_interleave(block[1])[:columns])
    return result
