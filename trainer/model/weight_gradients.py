"""Weight gradients added up in fp32 by the matrix multiplication itself, as apex's extension does, on torch alone.

Without it every microbatch writes each weight's gradient in the compute format and reads it again to add it to the
fp32 sum: 12 bytes a weight to memory and back, and a rounding to bf16 that the sum then carries.
"""

from __future__ import annotations

import torch


class WeightGradients:
    """Has the one function of apex's module `fused_weight_gradient_mlp_cuda` that fp32 sums need."""

    @staticmethod
    def wgrad_gemm_accum_fp32(inputs: torch.Tensor, gradient: torch.Tensor, total: torch.Tensor) -> None:
        """Add `gradient.T @ inputs` to `total`: inputs `[tokens, in]`, gradient `[tokens, out]`, total `[out, in]`."""
        if inputs.dtype == total.dtype:
            total.addmm_(gradient.t(), inputs)
        else:
            torch.addmm(total, gradient.t(), inputs, out_dtype=total.dtype, out=total)
