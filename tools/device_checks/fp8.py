"""FP8 on the device's own units: the cast kernel and the multiplication against the plain arithmetic of the recipes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tools.device_checks.outcome import Outcome, judge

if TYPE_CHECKING:
    import torch

    from parallel.mesh import Mesh

SHAPES = ((256, 512, 384), (48, 128, 64), (1000, 4096, 1024))
"""Tokens, width in, width out; the tokens are no multiple of any block."""
TOLERANCES = {True: 2e-2, False: 5e-3}
"""Largest error relative to the largest product, of forward products and of those for gradients.

bf16's rounding is 2e-3. Forward products add up in 14 bits on Hopper; DeepSeek-V3's report (arXiv:2412.19437, 3.3.2)
saw near 2e-2 with 4096 terms. 5.4e-3 was seen on an H200.
"""


def check_cast(mesh: Mesh) -> Outcome:
    """Compare the fused cast with the plain one, number by number, transposes, zeros and NaN included."""
    import torch

    from trainer.model.fp8.cast import cast_both
    from trainer.model.fp8.quantize import FORMATS, compute_amax, compute_scale, quantize

    problems = []
    for matrix in _matrices(mesh):
        turned = matrix.t().contiguous()
        for block in ((None, None), (1, None)):
            amax, across = compute_amax(matrix, block), compute_amax(matrix.t(), block)
            for name, dtype in FORMATS.items():
                found = cast_both(matrix, amax, None if block == (None, None) else across, dtype)
                for one, plain, largest in zip(found, (matrix, turned), (amax, across), strict=True):
                    expected = quantize(plain, compute_scale(largest, dtype), block, dtype)
                    same = torch.equal(one.data.float().nan_to_num(1e9), expected.data.float().nan_to_num(1e9))
                    same &= torch.equal(one.inverse_scale.nan_to_num(1e9), expected.inverse_scale.nan_to_num(1e9))
                    if not same:
                        kind = "transpose" if one is found[1] else "matrix"
                        scaled = "by row" if block[0] else "by tensor"
                        problems.append(
                            f"{name} {kind} {list(matrix.shape)} {scaled} differs from the plain conversion"
                        )
    return judge("fp8 cast kernel", problems, "equal to the plain conversion, number by number", {})


def check_multiply(mesh: Mesh, recipe: str) -> Outcome:
    """Compare the three multiplications of a linear layer on FP8 units with the emulation in fp32."""
    import torch

    from configs.fp8 import RECIPES
    from trainer.model.fp8.multiply import multiply_emulated, multiply_scaled
    from trainer.model.fp8.quantize import FORMATS, compute_amax, compute_scale, quantize

    block = RECIPES[recipe].activation_block
    problems, worst = [], {True: 0.0, False: 0.0}
    generator = torch.Generator(mesh.device).manual_seed(0)
    for tokens, width_in, width_out in SHAPES:
        for rows, columns, contraction, gradient in (
            (tokens, width_out, width_in, "e4m3"),
            (tokens, width_in, width_out, "e5m2"),
            (width_out, width_in, tokens, "e5m2"),
        ):
            operands = []
            for size, name in ((rows, gradient), (columns, "e4m3")):
                matrix = torch.randn(size, contraction, device=mesh.device, generator=generator).bfloat16()
                scale = compute_scale(compute_amax(matrix, block), FORMATS[name])
                operands.append(quantize(matrix, scale, block, FORMATS[name]))
            left, right = operands
            expected = multiply_emulated(left, right, torch.float32, is_forward=True)
            is_forward = gradient == "e4m3"
            found = multiply_scaled(left, right, torch.bfloat16, is_forward=is_forward).float()
            error = float((found - expected).abs().max() / expected.abs().max())
            worst[is_forward] = max(worst[is_forward], error)
            if not error <= TOLERANCES[is_forward]:
                problems.append(f"{rows}x{contraction} by {contraction}x{columns}: error {error:.1e}")
    figures = {"error": worst[True], "error_gradients": worst[False]}
    detail = f"largest error {worst[True]:.1e} of the largest product, {worst[False]:.1e} for gradients"
    return judge(f"fp8 {recipe} products", problems, detail, figures)


def _matrices(mesh: Mesh) -> list[torch.Tensor]:
    import torch

    generator = torch.Generator(mesh.device).manual_seed(0)
    matrices = [torch.randn(shape[:2], device=mesh.device, generator=generator).bfloat16() for shape in SHAPES]
    matrices += [torch.zeros(5, 3, device=mesh.device).bfloat16(), matrices[0] * 1e-6]
    for bad in (float("inf"), float("nan")):
        spoilt = matrices[1].clone()
        spoilt[3, 4] = bad
        matrices.append(spoilt)
    return matrices
