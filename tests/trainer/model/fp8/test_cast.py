"""The Triton kernel that makes a matrix and its transpose in FP8: its arithmetic, and that it compiles for GPUs.

Its arithmetic through Triton's interpreter on the CPU, where it writes fp32: the interpreter (Triton 3.6) converts to
FP8 wrongly, 1.99 to 1.0, where a carry should reach the exponent. On a GPU that conversion is one instruction, which
the compiled code is searched for; there tools/gpu_check.py compares the whole kernel.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[4]
COMPARE = """
import torch
from trainer.model.fp8.cast import fill_both
from trainer.model.fp8.quantize import FORMATS, compute_amax, compute_scale, quantize

whole, by_row = (None, None), (1, None)
torch.manual_seed(0)
cases = [torch.randn(70, 130) * 10 ** torch.empty(70, 1).uniform_(-4, 4), torch.zeros(5, 3), torch.full((2, 2), 448.0)]
cases += [torch.randn(65, 64).bfloat16(), torch.tensor([[1e-38, 0.0], [2.0**-120, -(2.0**-126)]])]
for bad in (float("inf"), float("nan")):
    cases.append(torch.randn(33, 40))
    cases[-1][3, 4] = bad

def compare(found, inverse, matrix, amax, block, dtype):
    expected = quantize(matrix, compute_scale(amax, dtype), block, dtype)
    assert torch.equal(inverse.nan_to_num(7.0), expected.inverse_scale.nan_to_num(7.0)), matrix
    nan = expected.data.float().isnan()
    assert torch.equal(found.isnan(), nan)
    assert torch.equal(found.to(dtype).float()[~nan], expected.data.float()[~nan]), (dtype, matrix)

for dtype in FORMATS.values():
    for matrix in cases:
        largest, turned = torch.finfo(dtype).max, matrix.t().contiguous()
        data, transposed = torch.empty(matrix.shape), torch.empty(turned.shape)
        amax = compute_amax(matrix, whole)
        for limit in (amax, amax / 3):  # delayed scaling may find larger values than it scales by
            inverse, same = fill_both(matrix, limit, None, largest, data, transposed)
            assert same is inverse
            compare(data, inverse, matrix, limit, whole, dtype)
            compare(transposed, inverse, turned, limit, whole, dtype)
        rows, columns = compute_amax(matrix, by_row), compute_amax(matrix.t(), by_row)
        assert torch.equal(columns.nan_to_num(7.0), compute_amax(turned, by_row).nan_to_num(7.0))
        row_inverse, column_inverse = fill_both(matrix, rows, columns, largest, data, transposed)
        compare(data, row_inverse, matrix, rows, by_row, dtype)
        compare(transposed, column_inverse, turned, columns, by_row, dtype)
print(len(cases), "cases")
"""
COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from trainer.model.fp8.cast import _NUM_SCALES, _SIZE, _cast_kernel, _scale_kernel

target = GPUTarget("cuda", int(sys.argv[1]), 32)

def compile(kernel, constants, **types):
    signature = types | dict.fromkeys(constants, "constexpr")
    # Triton compiles once more for addresses and sizes that are multiples of 16, and for sizes of 1.
    aligned = {(place,): [["tt.divisibility", 16]] for place in range(len(types))}
    for attributes in (None, aligned):
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
        yield triton.compile(source, target=target)
    if "num_rows" in types:
        fixed = {"num_rows": 1} | constants
        signature = types | dict.fromkeys(fixed, "constexpr")
        yield triton.compile(ASTSource(fn=kernel, signature=signature, constexprs=fixed), target=target)

number = 0
for by_row in (False, True):
    for format, largest, instruction in (("fp8e4nv", 448.0, "e4m3"), ("fp8e5", 57344.0, "e5m2")):
        types = {"source": "*bf16", "row_scale": "*fp32", "column_scale": "*fp32", "data": f"*{format}"}
        types |= {"transposed": f"*{format}", "num_rows": "i32", "num_columns": "i32"}
        for compiled in compile(_cast_kernel, {"largest": largest, "BY_ROW": by_row, "SIZE": _SIZE}, **types):
            assert f"cvt.rn.satfinite.{instruction}x2" in compiled.asm["ptx"], "no conversion to FP8 by the hardware"
            number += len(compiled.asm["cubin"]) > 1000
types = {"amax": "*fp32", "scale": "*fp32", "inverse": "*fp32", "num_values": "i32"}
for compiled in compile(_scale_kernel, {"largest": 448.0, "SIZE": _NUM_SCALES}, **types):
    number += len(compiled.asm["cubin"]) > 1000
print(number, "compiled")
"""


def run_apart(code: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own: Triton reads its variables when it is imported."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


def test_the_kernel_equals_the_plain_arithmetic():
    done = run_apart(COMPARE, TRITON_INTERPRET="1")
    assert done.returncode == 0 and done.stdout == "7 cases\n", done.stderr


@pytest.mark.parametrize("capability", [89, 90, 100], ids=["ada", "hopper", "blackwell"])
def test_the_kernel_compiles(tmp_path, capability):
    done = run_apart(COMPILE, str(capability), TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0 and done.stdout == "14 compiled\n", done.stderr
