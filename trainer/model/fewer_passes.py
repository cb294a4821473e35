"""SwiGLU and RMSNorm in fewer passes over memory, where no kernel holds several operations: bit for bit torch's.

Autograd keeps and walks a tensor for each elementary operation; written out by hand the same roundings happen in the
same order, with fewer tensors between. Knows no layers: `trainer.engine.kernels` says where they are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class _SwiGlu(torch.autograd.Function):
    """silu(gate) * up; the gradients of both halves are written where they belong instead of being joined."""

    @staticmethod
    def forward(ctx: Any, halves: torch.Tensor) -> torch.Tensor:
        gate, up = halves.chunk(2, dim=-1)
        opened = torch.nn.functional.silu(gate)
        ctx.save_for_backward(halves, opened)
        return opened * up

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        (gradient,) = gradients
        halves, opened = ctx.saved_tensors
        gate, up = halves.chunk(2, dim=-1)
        result = torch.empty_like(halves)
        of_gate, of_up = result.chunk(2, dim=-1)
        torch.mul(gradient, opened, out=of_up)
        torch.mul(gradient, up, out=of_gate)
        torch.ops.aten.silu_backward.grad_input(of_gate, gate, grad_input=of_gate)
        return result


def swiglu(halves: torch.Tensor, bias: torch.Tensor | None, *options: Any) -> torch.Tensor:
    """Return `silu(gate) * up` (Shazeer 2020, arXiv:2002.05202): halves `[..., 2 * ffn]`, bias `[2 * ffn]`.

    The arguments are those of Megatron-Core's `bias_swiglu_impl`; its options, to store or offload the input otherwise,
    are for GPUs.
    """
    halves = halves if bias is None else halves + bias
    if not torch.is_grad_enabled():
        gate, up = halves.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate).mul_(up)
    result: torch.Tensor = _SwiGlu.apply(halves)
    return result


def weighted_swiglu(
    halves: torch.Tensor, bias: torch.Tensor | None, weights: torch.Tensor, *options: Any
) -> torch.Tensor:
    """Return `swiglu` times a weight per token, `weights [..., 1]`, in the format of `halves`: an expert's share."""
    return (swiglu(halves, bias) * weights).to(halves.dtype)


class _RmsNorm(torch.autograd.Function):
    """x * rsqrt(mean(x^2) + eps) * weight in fp32.

    The hidden state comes twice, once to be scaled and once to be measured, so that its two gradients join a residual's
    one after the other, as autograd adds up those of the elementary operations.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, measured: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        inverse = hidden.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()  # [..., 1]
        normed = hidden * inverse
        ctx.save_for_backward(hidden, weight, inverse, normed)
        return normed * weight

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        (gradient,) = gradients
        hidden, weight, inverse, normed = ctx.saved_tensors
        of_weight = (gradient * normed).sum(tuple(range(hidden.dim() - 1)))
        of_normed = gradient * weight
        product = of_normed * hidden
        # Of the mean square; times 2, which is exact, of the hidden state.
        of_square = product.sum(-1, keepdim=True) * (-0.5 * inverse.pow(3)) / hidden.shape[-1]
        torch.mul(hidden, 2.0 * of_square, out=product)
        return of_normed.mul_(inverse), product, of_weight, None


_rms_norm = torch.nn.functional.rms_norm


def rms_norm(
    hidden: torch.Tensor, shape: Sequence[int], weight: torch.Tensor | None = None, eps: float | None = None
) -> torch.Tensor:
    """Normalise by the root mean square (arXiv:1910.07467), with the signature of `torch.nn.functional.rms_norm`.

    Formats of 16 bits, for which torch rounds in other places, go on to torch.
    """
    if weight is None or eps is None or hidden.dim() < 2 or {hidden.dtype, weight.dtype} != {torch.float32}:
        return _rms_norm(hidden, list(shape), weight, eps)
    if not tuple(shape) == weight.shape == hidden.shape[-1:]:  # several dimensions, or what torch refuses
        return _rms_norm(hidden, list(shape), weight, eps)
    if not torch.is_grad_enabled():
        inverse = hidden.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
        return (hidden * inverse).mul_(weight)
    result: torch.Tensor = _RmsNorm.apply(hidden, hidden, weight, eps)
    return result
