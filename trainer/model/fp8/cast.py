"""A matrix to FP8 and its transpose in one pass over memory, for scales by tensor and by row: a Triton kernel.

FP8 units read both operands of a multiplication along the contraction, so a backward pass needs transposes. Made one
after the other with PyTorch's operations, conversion and transposes cost about what FP8 saves. The arithmetic is that
of `quantize`, which is its judge in the tests (through Triton's interpreter where there is no GPU). The scales come
from a kernel of their own: computed in the same one by row, they crash the compiler of Triton 3.6.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trainer.model.fp8.quantize import Quantized

_SIZE = 64  # of the square a program converts
_NUM_SCALES = 256  # that a program computes


@triton.jit
def _compute_scale(amax, largest: tl.constexpr):  # type: ignore[no-untyped-def]
    ratio = tl.minimum(largest / amax, 8.507059173023462e37)  # 2^126
    scale = (ratio.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    scale = tl.where(amax > 0, scale, 1.0)
    return tl.where(amax - amax == 0, scale, float("nan"))


@triton.jit
def _convert(values, scale, target, largest: tl.constexpr):  # type: ignore[no-untyped-def]
    scaled = values * scale
    cut = tl.minimum(tl.maximum(scaled, -largest), largest)
    return tl.where(scaled == scaled, cut, scaled).to(target.dtype.element_ty)  # minimum and maximum drop NaN


@triton.jit
def _scale_kernel(  # type: ignore[no-untyped-def]
    amax, scale, inverse, num_values, largest: tl.constexpr, SIZE: tl.constexpr
):
    places = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    inside = places < num_values
    computed = _compute_scale(tl.load(amax + places, mask=inside, other=1.0), largest)
    tl.store(scale + places, computed, mask=inside)
    tl.store(inverse + places, 1.0 / computed, mask=inside)


@triton.jit
def _cast_kernel(  # type: ignore[no-untyped-def]
    source,
    row_scale,
    column_scale,
    data,
    transposed,
    num_rows,
    num_columns,
    largest: tl.constexpr,
    BY_ROW: tl.constexpr,
    SIZE: tl.constexpr,
):
    rows = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    columns = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    has_row, has_column = rows < num_rows, columns < num_columns
    inside = has_row[:, None] & has_column[None, :]
    wide_rows, wide_columns = rows.to(tl.int64), columns.to(tl.int64)
    along = wide_rows[:, None] * num_columns + wide_columns[None, :]
    across = wide_columns[:, None] * num_rows + wide_rows[None, :]
    values = tl.load(source + along, mask=inside, other=0.0).to(tl.float32)
    if BY_ROW:
        by_row = tl.load(row_scale + rows, mask=has_row, other=1.0)
        by_column = tl.load(column_scale + columns, mask=has_column, other=1.0)
        result = _convert(values, by_row[:, None], data, largest)
        turned = tl.trans(_convert(values, by_column[None, :], transposed, largest))
    else:
        result = _convert(values, tl.load(row_scale), data, largest)
        turned = tl.trans(result)
    tl.store(data + along, result, mask=inside)
    tl.store(transposed + across, turned, mask=tl.trans(inside))


def cast_both(
    matrix: torch.Tensor, row_amax: torch.Tensor, column_amax: torch.Tensor | None, dtype: torch.dtype
) -> tuple[Quantized, Quantized]:
    """Return `matrix [rows, columns]`, bf16, and its transpose in FP8.

    Each row of the matrix is scaled by its `row_amax [rows, 1]`, each of the transpose by its `column_amax
    [columns, 1]`; both are scaled by the one value `row_amax [1, 1]` if there is no other.
    """
    data = torch.empty_like(matrix, dtype=dtype, memory_format=torch.contiguous_format)
    transposed = torch.empty(matrix.shape[1], matrix.shape[0], dtype=dtype, device=matrix.device)
    row_inverse, column_inverse = fill_both(matrix, row_amax, column_amax, torch.finfo(dtype).max, data, transposed)
    block = (None, None) if column_amax is None else (1, None)
    return Quantized(data, row_inverse, block), Quantized(transposed, column_inverse, block)


def fill_both(
    matrix: torch.Tensor,
    row_amax: torch.Tensor,
    column_amax: torch.Tensor | None,
    largest: float,
    data: torch.Tensor,
    transposed: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write the scaled matrix, cut to `largest`, into `data` and `transposed`, in their format; return 1 / scales."""
    matrix = matrix.contiguous()
    num_rows, num_columns = matrix.shape
    row_scale, row_inverse = _make_scales(row_amax, largest)
    column_scale, column_inverse = row_scale, row_inverse
    if column_amax is not None:
        column_scale, column_inverse = _make_scales(column_amax, largest)
    _cast_kernel[(triton.cdiv(num_rows, _SIZE), triton.cdiv(num_columns, _SIZE))](
        matrix,
        row_scale,
        column_scale,
        data,
        transposed,
        num_rows,
        num_columns,
        largest,
        BY_ROW=column_amax is not None,
        SIZE=_SIZE,
    )
    return row_inverse, column_inverse


def _make_scales(amax: torch.Tensor, largest: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scales of the largest values `amax [n, 1]`, and their inverses."""
    scale, inverse = torch.empty_like(amax), torch.empty_like(amax)
    _scale_kernel[(triton.cdiv(amax.numel(), _NUM_SCALES),)](
        amax, scale, inverse, amax.numel(), largest, SIZE=_NUM_SCALES
    )
    return scale, inverse
