"""The Triton kernel that makes a matrix and its transpose in FP8, through Triton's interpreter on the CPU.

It writes fp32 here: the interpreter (Triton 3.6) converts to FP8 wrongly, 1.99 to 1.0, where a carry should reach the
exponent. That conversion is one instruction on a GPU, where tools/gpu_check.py compares the whole kernel.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
COMPARE = """
import torch
from trainer.model.fp8.cast import fill_both
from trainer.model.fp8.quantize import FORMATS, compute_amax, compute_scale, quantize

whole = (None, None)
torch.manual_seed(0)
cases = [torch.randn(70, 130) * 10 ** torch.empty(70, 1).uniform_(-4, 4), torch.zeros(5, 3), torch.full((2, 2), 448.0)]
cases += [torch.randn(65, 64).bfloat16(), torch.tensor([[1e-38, 0.0], [2.0**-120, -(2.0**-126)]])]
for bad in (float("inf"), float("nan")):
    cases.append(torch.randn(33, 40))
    cases[-1][3, 4] = bad
for dtype in FORMATS.values():
    for matrix in cases:
        amax, largest = compute_amax(matrix, whole), torch.finfo(dtype).max
        for limit in (amax, amax / 3):  # delayed scaling may find larger values than it scales by
            expected = quantize(matrix, compute_scale(limit, dtype), whole, dtype)
            data = torch.empty(matrix.shape)
            transposed = torch.empty(matrix.shape[::-1])
            inverse = fill_both(matrix, limit, largest, data, transposed)
            assert torch.equal(inverse.nan_to_num(7.0), expected.inverse_scale.nan_to_num(7.0)), matrix
            assert torch.equal(data.nan_to_num(1e9), transposed.t().nan_to_num(1e9))
            nan = expected.data.float().isnan()
            assert torch.equal(data.isnan(), nan)
            assert torch.equal(data.to(dtype).float()[~nan], expected.data.float()[~nan]), (dtype, matrix)
print(len(cases), "cases")
"""


def test_the_kernel_equals_the_plain_arithmetic():
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", COMPARE], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "7 cases\n", done.stderr
