"""The numerics of every recipe against an independent statement in float64: each number, each product."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from configs.fp8 import RECIPES
from trainer.model.fp8.multiply import multiply_emulated, multiply_scaled
from trainer.model.fp8.quantize import FORMATS, compute_amax, compute_scale, dequantize, quantize

# Mantissa bits, smallest normal exponent, largest number (Micikevicius et al. 2022, arXiv:2209.05433, table 1).
DEFINITIONS = {"e4m3": (3, -6, 448.0), "e5m2": (2, -14, 57344.0)}
ROWS, COLUMNS = 150, 200


def round_to(value: float, name: str) -> float:
    """Return the nearest number of the format, ties to even, in float64 arithmetic alone."""
    bits, smallest, largest = DEFINITIONS[name]
    if value == 0:
        return 0.0
    exponent = max(math.floor(math.log2(abs(value))), smallest)
    step = 2.0 ** (exponent - bits)
    return math.copysign(min(round(abs(value) / step) * step, largest), value)  # Python rounds ties to even


def state(matrix: np.ndarray, block: tuple, name: str) -> np.ndarray:
    """Return what a matrix becomes in FP8 with a power-of-two scale for each block, number by number."""
    rows, columns = block[0] or matrix.shape[0], block[1] or matrix.shape[1]
    result = np.zeros_like(matrix)
    for top in range(0, matrix.shape[0], rows):
        for left in range(0, matrix.shape[1], columns):
            part = matrix[top : top + rows, left : left + columns]
            largest = np.abs(part).max()
            scale = 2.0 ** math.floor(math.log2(DEFINITIONS[name][2] / largest)) if largest else 1.0
            rounded = [[round_to(value * scale, name) / scale for value in row] for row in part]
            result[top : top + rows, left : left + columns] = rounded
    return result


def make_matrix(seed: int = 0) -> torch.Tensor:
    """Return numbers over many binades, zeros, a row and a block of nothing among them."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(ROWS, COLUMNS, generator=generator) * 10 ** torch.empty(ROWS, 1).uniform_(
        -4, 4, generator=generator
    )
    matrix[7] = 0.0
    matrix[::3, ::5] = 0.0
    return matrix


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("operand", ["activation_block", "weight_block"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_number_equals_its_statement(recipe, operand, name):
    matrix, block = make_matrix(), getattr(RECIPES[recipe], operand)
    amax = compute_amax(matrix, block)
    quantized = quantize(matrix, compute_scale(amax, FORMATS[name]), block, FORMATS[name])
    found = dequantize(quantized, torch.float32)
    expected = state(matrix.double().numpy(), block, name)
    assert np.array_equal(found.double().numpy(), expected)
    assert torch.equal(dequantize(quantized, torch.bfloat16).float(), found), "bf16 holds FP8 numbers exactly"


@pytest.mark.parametrize("name", FORMATS)
def test_all_numbers_of_the_format_stay_as_they_are(name):
    numbers = torch.arange(256, dtype=torch.uint8).view(FORMATS[name]).float()
    numbers = numbers[torch.isfinite(numbers)]
    assert [round_to(value, name) for value in numbers.tolist()] == numbers.tolist()
    one = torch.ones(1, 1)
    quantized = quantize(numbers[None], one, (None, None), FORMATS[name])
    assert torch.equal(dequantize(quantized, torch.float32)[0], numbers)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("amax", [1e-30, 2.0**-127, 1e-6, 0.999, 1.0, 448.0, 448.1, 57344.0, 3e38])
def test_scales_are_powers_of_two_that_fit(amax, name):
    scale = float(compute_scale(torch.tensor([[amax]]), FORMATS[name]))
    largest = DEFINITIONS[name][2]
    assert math.frexp(scale)[0] == 0.5
    assert float(torch.tensor(amax)) * scale <= largest
    assert scale == 2.0**126 or 2 * scale * float(torch.tensor(amax)) > largest


def test_nothing_is_scaled_by_one():
    assert float(compute_scale(torch.zeros(1, 1), FORMATS["e4m3"])) == 1.0


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("block", [(None, None), (1, None), (1, 32)])
def test_what_is_not_finite_is_not_cut_to_a_number(block, bad):
    matrix = make_matrix()
    matrix[3, 40] = bad
    scale = compute_scale(compute_amax(matrix, block), FORMATS["e4m3"])
    found = dequantize(quantize(matrix, scale, block, FORMATS["e4m3"]), torch.float32)
    assert torch.isnan(found[3, 40]) and (block == (None, None) or torch.isfinite(found[4:]).all())


@pytest.mark.parametrize("recipe", RECIPES)
def test_products_are_those_of_the_statement(recipe):
    """fp32 sums of exact products: the emulation differs from float64 by the order of summation alone."""
    left, right = make_matrix(1)[:40], make_matrix(2)[:48]
    block = RECIPES[recipe].activation_block
    operands = [
        quantize(m, compute_scale(compute_amax(m, block), FORMATS["e4m3"]), block, FORMATS["e4m3"])
        for m in (left, right)
    ]
    expected = state(left.double().numpy(), block, "e4m3") @ state(right.double().numpy(), block, "e4m3").T
    found = multiply_emulated(*operands, torch.float32, is_forward=True).double().numpy()
    lengths = np.linalg.norm(left.numpy(), axis=1)[:, None] * np.linalg.norm(right.numpy(), axis=1)[None]
    assert (np.abs(found - expected) <= 1e-6 * lengths + 1e-30).all()


@pytest.mark.parametrize("num_columns", [64, 50])
def test_torchs_kernel_multiplies_as_the_emulation(num_columns):
    """`torch._scaled_mm` has a CPU kernel for scales by tensor; a contraction of any length is filled up."""
    block = (None, None)
    left, right = make_matrix(1)[:32, :num_columns], make_matrix(2)[:48, :num_columns]
    operands = [
        quantize(m, compute_scale(compute_amax(m, block), FORMATS["e4m3"]), block, FORMATS["e4m3"])
        for m in (left, right)
    ]
    expected = multiply_emulated(*operands, torch.float32, is_forward=True)
    found = multiply_scaled(*operands, torch.float32, is_forward=True)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
