"""The FP8 forward and backward of one of Megatron-Core's parallel linears, on all ranks of its tp group.

Stands in for the layer's `_forward_impl`; the layer itself still owns weight, bias and checkpoint. The three matrix
multiplications have operands in three roles: y = x W^T, dx = dy W, dW = dy^T x. Communication is that of
Megatron-Core's own linear: with sp the input is gathered and its gradient reduced and scattered; else the input's
gradient is summed over tp, while the weight's is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from configs.fp8 import Block, Recipe
from trainer.model.fp8.history import AmaxHistory, Site
from trainer.model.fp8.multiply import Multiply
from trainer.model.fp8.quantize import Quantized, compute_amax, compute_scale, quantize

_WHOLE: Block = (None, None)


@dataclass
class Scheme:
    """What all FP8 linears of a model share."""

    recipe: Recipe
    dtypes: dict[str, torch.dtype]
    """FP8 format by role (input, weight, gradient)."""
    multiply: Multiply
    history: AmaxHistory | None
    weights_version: int = 0
    """Counts changes of the weights, so that each is quantised once a step, not once a microbatch."""

    def block(self, role: str) -> Block:
        """Return what shares a scale in an operand whose columns are the contraction."""
        return self.recipe.weight_block if role == "weight" else self.recipe.activation_block


class Fp8Linear:
    """One linear layer's FP8 matrix multiplications."""

    def __init__(self, scheme: Scheme, site: Site, split: dict[str, int | None], tp_group: Any) -> None:
        """`split` says which dimension of x [tokens, in], W [out, in] and dy [tokens, out] lies across `tp_group`."""
        self._scheme, self._site, self._split, self._tp_group = scheme, site, split, tp_group
        self._weights: dict[bool, Quantized] = {}
        self._weights_version = -1

    def __call__(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        **unused: Any,
    ) -> torch.Tensor:
        """Return `input [..., in] @ weight[out, in].T (+ bias)`; the arguments are those of Megatron-Core's function.

        What it has further concerns fused accumulation and deferred embedding gradients, which layers do not use.
        """
        # Recording follows the gradient: not in validation, and once where a layer is computed again.
        output = _Function.apply(
            input, weight, self, torch.is_grad_enabled(), allreduce_dgrad, sequence_parallel, self._tp_group
        )
        return output if bias is None else output + bias

    def tensor_scale(self, role: str, matrix: torch.Tensor, *, is_recording: bool) -> torch.Tensor | None:
        """Return the scale of a whole operand, or None where its blocks have scales of their own."""
        scheme, dtype = self._scheme, self._scheme.dtypes[role]
        if scheme.block(role) != _WHOLE:
            return None
        amax, history = compute_amax(matrix, _WHOLE), scheme.history
        if history is None:
            return compute_scale(self._agree(role, amax, is_split=self._split[role] is not None), dtype)
        if is_recording:
            history.record(self._site, role, amax)
        if history.is_empty:  # the first step scales by what it sees, as there is nothing to remember yet
            return compute_scale(self._agree(role, amax, is_split=self._split[role] is not None), dtype)
        past = history.amax(self._site, role).view(1, 1)
        # An infinity of today must not be cut to yesterday's range: adding it makes the scale NaN.
        return compute_scale(torch.where(past > 0, past, amax), dtype) + amax * 0

    def quantize(self, role: str, matrix: torch.Tensor, scale: torch.Tensor | None) -> Quantized:
        """Return an operand `matrix [rows, contraction]`; `scale` is that of the whole, if there is one."""
        return self._quantize(role, matrix, scale, transposed=False)

    def quantize_transposed(self, role: str, matrix: torch.Tensor, scale: torch.Tensor | None) -> Quantized:
        """Return the transpose of `matrix` as an operand, whose columns are the contraction."""
        return self._quantize(role, matrix.t().contiguous(), scale, transposed=True)

    def quantize_weight(self, weight: torch.Tensor, *, transposed: bool) -> Quantized:
        """Return the weight for the forward pass, or transposed for the gradient of the input; once a step each."""
        if self._weights_version != self._scheme.weights_version:
            self._weights, self._weights_version = {}, self._scheme.weights_version
        if transposed not in self._weights:
            matrix = weight.detach()
            scale = self.tensor_scale("weight", matrix, is_recording=True)
            prepare = self.quantize_transposed if transposed else self.quantize
            self._weights[transposed] = prepare("weight", matrix, scale)
        return self._weights[transposed]

    def multiply(
        self, left: Quantized, right: Quantized, dtype: torch.dtype, *, is_forward: bool = False
    ) -> torch.Tensor:
        """Return `left @ right.T`; of nothing, zeros: experts may get no token."""
        if 0 in (*left.data.shape, *right.data.shape):
            return torch.zeros(left.data.shape[0], right.data.shape[0], dtype=dtype, device=left.data.device)
        return self._scheme.multiply(left, right, dtype, is_forward=is_forward)

    def _quantize(self, role: str, matrix: torch.Tensor, scale: torch.Tensor | None, *, transposed: bool) -> Quantized:
        block, dtype = self._scheme.block(role), self._scheme.dtypes[role]
        if scale is None:
            split = self._split[role]
            dim = None if split is None else (1 - split if transposed else split)
            amax = self._agree(role, compute_amax(matrix, block), is_split=dim is not None and block[dim] is None)
            scale = compute_scale(amax, dtype)
        return quantize(matrix, scale, block, dtype)

    def _agree(self, role: str, amax: torch.Tensor, *, is_split: bool) -> torch.Tensor:
        """Return the largest values over all parts of what shares a scale, so that every layout scales alike."""
        if is_split and self._tp_group.size() > 1:
            dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=self._tp_group)
        return amax


class _Function(torch.autograd.Function):
    """Forward and backward of `Fp8Linear`."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        weight: torch.Tensor,
        linear: Fp8Linear,
        is_recording: bool,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: Any,
    ) -> torch.Tensor:
        total = _gather(inputs, tp_group) if sequence_parallel else inputs
        x = total.reshape(-1, total.shape[-1])  # [tokens, in]
        scale = None if x.numel() == 0 else linear.tensor_scale("input", x, is_recording=is_recording)
        weights = linear.quantize_weight(weight, transposed=False)
        if x.numel() == 0:
            output = x.new_zeros(0, weight.shape[0])
        else:
            output = linear.multiply(linear.quantize("input", x, scale), weights, x.dtype, is_forward=True)
        ctx.save_for_backward(inputs, weight)
        ctx.scale, ctx.linear, ctx.tp_group, ctx.is_recording = scale, linear, tp_group, is_recording
        ctx.allreduce_dgrad, ctx.sequence_parallel = allreduce_dgrad, sequence_parallel
        return output.view(*total.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        linear, group = ctx.linear, ctx.tp_group
        gradient = gradients[0].reshape(-1, weight.shape[0]).contiguous()  # [tokens, out]
        needs_weight = ctx.needs_input_grad[1]
        if gradient.numel() == 0:
            return torch.zeros_like(inputs), torch.zeros_like(weight) if needs_weight else None, *[None] * 5
        total, gathering = inputs, None
        if needs_weight and ctx.sequence_parallel:
            total, gathering = _start_gather(inputs, group)
        scale = linear.tensor_scale("gradient", gradient, is_recording=ctx.is_recording)
        operand = linear.quantize("gradient", gradient, scale)
        weights = linear.quantize_weight(weight, transposed=True)
        input_gradient = linear.multiply(operand, weights, inputs.dtype)
        input_gradient = input_gradient.view(*gradients[0].shape[:-1], weight.shape[1])
        reducing = None
        if ctx.allreduce_dgrad:
            reducing = dist.all_reduce(input_gradient, group=group, async_op=True)
        elif ctx.sequence_parallel:
            part = torch.empty_like(inputs)
            reducing = dist.reduce_scatter_tensor(part, input_gradient, group=group, async_op=True)
        weight_gradient = None
        if needs_weight:
            if gathering is not None:
                gathering.wait()
            x = total.reshape(-1, total.shape[-1])
            left = linear.quantize_transposed("gradient", gradient, scale)
            right = linear.quantize_transposed("input", x, ctx.scale)
            weight_gradient = linear.multiply(left, right, weight.dtype)
        if reducing is not None:
            reducing.wait()
        return part if ctx.sequence_parallel else input_gradient, weight_gradient, *[None] * 5


def _gather(part: torch.Tensor, group: Any) -> torch.Tensor:
    whole, gathering = _start_gather(part, group)
    gathering.wait()
    return whole


def _start_gather(part: torch.Tensor, group: Any) -> tuple[torch.Tensor, Any]:
    """Begin to gather the sequence, which sp splits over tp; return the whole and what to wait for."""
    whole = part.new_empty(part.shape[0] * group.size(), *part.shape[1:])
    return whole, dist.all_gather_into_tensor(whole, part.contiguous(), group=group, async_op=True)
