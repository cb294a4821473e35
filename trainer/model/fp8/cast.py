"""A matrix to FP8 and its transpose in one pass over memory, for scales by tensor: a Triton kernel.

FP8 units read both operands of a multiplication along the contraction, so a backward pass needs transposes. Made one
after the other with PyTorch's operations, conversion and transposes cost about what FP8 saves. The arithmetic is that
of `quantize`, which is its judge in the tests (through Triton's interpreter where there is no GPU).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trainer.model.fp8.quantize import Quantized

_SIZE = 64  # of the square a program converts


@triton.jit
def _cast_kernel(  # type: ignore[no-untyped-def]
    source, amax, data, transposed, inverse_scale, num_rows, num_columns, largest: tl.constexpr, SIZE: tl.constexpr
):
    biggest = tl.load(amax)
    ratio = tl.minimum(largest / biggest, 8.507059173023462e37)  # 2^126
    scale = (ratio.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    scale = tl.where(biggest > 0, scale, 1.0)
    scale = tl.where(biggest - biggest == 0, scale, float("nan"))
    first_row, first_column = tl.program_id(0), tl.program_id(1)
    rows = first_row * SIZE + tl.arange(0, SIZE)
    columns = first_column * SIZE + tl.arange(0, SIZE)
    inside = (rows[:, None] < num_rows) & (columns[None, :] < num_columns)
    wide_rows, wide_columns = rows.to(tl.int64), columns.to(tl.int64)
    values = tl.load(source + wide_rows[:, None] * num_columns + wide_columns[None, :], mask=inside, other=0.0)
    scaled = values.to(tl.float32) * scale
    cut = tl.minimum(tl.maximum(scaled, -largest), largest)
    result = tl.where(scaled == scaled, cut, scaled).to(data.dtype.element_ty)  # minimum and maximum drop NaN
    tl.store(data + wide_rows[:, None] * num_columns + wide_columns[None, :], result, mask=inside)
    across = wide_columns[:, None] * num_rows + wide_rows[None, :]
    tl.store(transposed + across, tl.trans(result), mask=tl.trans(inside))
    if first_row + first_column == 0:
        tl.store(inverse_scale, 1.0 / scale)


def cast_both(matrix: torch.Tensor, amax: torch.Tensor, dtype: torch.dtype) -> tuple[Quantized, Quantized]:
    """Return `matrix [rows, columns]` and its transpose in FP8, scaled by the one value `amax`."""
    data = torch.empty_like(matrix, dtype=dtype, memory_format=torch.contiguous_format)
    transposed = torch.empty(matrix.shape[1], matrix.shape[0], dtype=dtype, device=matrix.device)
    inverse_scale = fill_both(matrix, amax, torch.finfo(dtype).max, data, transposed)
    whole = (None, None)
    return Quantized(data, inverse_scale, whole), Quantized(transposed, inverse_scale, whole)


def fill_both(
    matrix: torch.Tensor, amax: torch.Tensor, largest: float, data: torch.Tensor, transposed: torch.Tensor
) -> torch.Tensor:
    """Write the scaled matrix, cut to `largest`, into `data` and `transposed`, in their format; return 1 / scale."""
    matrix = matrix.contiguous()
    num_rows, num_columns = matrix.shape
    inverse_scale = torch.empty(1, 1, dtype=torch.float32, device=matrix.device)
    grid = (triton.cdiv(num_rows, _SIZE), triton.cdiv(num_columns, _SIZE))
    _cast_kernel[grid](matrix, amax, data, transposed, inverse_scale, num_rows, num_columns, largest, SIZE=_SIZE)
    return inverse_scale
