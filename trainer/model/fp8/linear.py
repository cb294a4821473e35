"""The FP8 forward and backward of one of Megatron-Core's parallel linears, on all ranks of its tp group.

Stands in for the layer's `_forward_impl`; the layer itself still owns weight, bias and checkpoint. The three matrix
multiplications have operands in three roles: y = x W^T, dx = dy W, dW = dy^T x. Communication is that of
Megatron-Core's own linear: with sp the input is gathered and its gradient reduced and scattered; else the input's
gradient is summed over tp, while the weight's is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from configs.fp8 import Block, Recipe
from trainer.model.fp8.history import AmaxHistory, Site
from trainer.model.fp8.multiply import Multiply
from trainer.model.fp8.quantize import Quantized, compute_amax, compute_scale, quantize

_WHOLE: Block = (None, None)
_ROWS: Block = (1, None)
CastBoth = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.dtype], tuple[Quantized, Quantized]]


@dataclass
class Scheme:
    """What all FP8 linears of a model share."""

    recipe: Recipe
    dtypes: dict[str, torch.dtype]
    """FP8 format by role (input, weight, gradient)."""
    multiply: Multiply
    history: AmaxHistory | None
    cast_both: CastBoth | None = None
    """Makes a matrix in bf16 and its transpose in one pass, scaled by one value or by row; None: one by one."""
    weights_version: int = 0
    """Counts changes of the weights, so that each is quantised once a step, not once a microbatch."""

    def block(self, role: str) -> Block:
        """Return what shares a scale in an operand whose columns are the contraction."""
        return self.recipe.weight_block if role == "weight" else self.recipe.activation_block


class Operand:
    """A matrix in FP8, as it is and transposed, each made when it is first asked for."""

    def __init__(self, linear: Fp8Linear, role: str, matrix: torch.Tensor, amax: torch.Tensor | None) -> None:
        """`amax` is the value that scales the whole matrix, None where its blocks have scales of their own."""
        self._linear, self._role, self._matrix, self.amax = linear, role, matrix, amax
        self._made: dict[bool, Quantized] = {}

    def get(self, *, transposed: bool) -> Quantized:
        """Return the matrix, or its transpose, with the contraction along the columns."""
        scheme, dtype = self._linear.scheme, self._linear.scheme.dtypes[self._role]
        block = scheme.block(self._role)
        if transposed in self._made:
            return self._made[transposed]
        # A GPU before Hopper converts fp32 by way of fp16, which rounds twice; what bf16 holds it converts exactly.
        if scheme.cast_both is not None and block in (_WHOLE, _ROWS) and self._matrix.dtype is torch.bfloat16:
            columns = None if self.amax is not None else self._agreed_amax(block, transposed=True)
            rows = self.amax if self.amax is not None else self._agreed_amax(block, transposed=False)
            self._made[False], self._made[True] = scheme.cast_both(self._matrix, rows, columns, dtype)
        else:
            matrix = self._matrix.t().contiguous() if transposed else self._matrix
            amax = self.amax if self.amax is not None else self._agreed_amax(block, transposed=transposed)
            self._made[transposed] = quantize(matrix, compute_scale(amax, dtype), block, dtype)
        return self._made[transposed]

    def _agreed_amax(self, block: Block, *, transposed: bool) -> torch.Tensor:
        """Return the largest value of each block of the matrix or its transpose. Collective where they lie over tp."""
        matrix = self._matrix.t() if transposed else self._matrix
        return self._linear.agree(self._role, compute_amax(matrix, block), block, transposed=transposed)


class Fp8Linear:
    """One linear layer's FP8 matrix multiplications."""

    def __init__(
        self, scheme: Scheme, site: Site, split: dict[str, int | None], tp_group: Any, cp_group: Any = None
    ) -> None:
        """`split` says which dimension of x [tokens, in], W [out, in] and dy [tokens, out] lies across `tp_group`.

        The tokens lie across `cp_group`, but those of an expert come from anywhere: it has none.
        """
        self.scheme, self.tp_group, self._cp_group = scheme, tp_group, cp_group
        self._site, self._split = site, split
        self._weight: Operand | None = None
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
        # Validation leaves no trace in the history, and a layer that is computed again leaves one, not two.
        output = _Function.apply(input, weight, self, torch.is_grad_enabled(), allreduce_dgrad, sequence_parallel)
        return output if bias is None else output + bias

    def operand(self, role: str, matrix: torch.Tensor, *, is_recording: bool) -> Operand:
        """Return an operand `matrix`, scaled as the recipe says."""
        return Operand(self, role, matrix, self._tensor_amax(role, matrix, is_recording=is_recording))

    def weight_operand(self, weight: torch.Tensor) -> Operand:
        """Return the weight as an operand, the same one until the weights change."""
        if self._weight is None or self._weights_version != self.scheme.weights_version:
            self._weight = self.operand("weight", weight.detach(), is_recording=True)
            self._weights_version = self.scheme.weights_version
        return self._weight

    def free_weight(self) -> None:
        """Forget the weight in FP8; it is made anew when it is asked for."""
        self._weight = None

    def multiply(
        self, left: Quantized, right: Quantized, dtype: torch.dtype, *, is_forward: bool = False
    ) -> torch.Tensor:
        """Return `left @ right.T`."""
        return self.scheme.multiply(left, right, dtype, is_forward=is_forward)

    def agree(self, role: str, amax: torch.Tensor, block: Block, *, transposed: bool) -> torch.Tensor:
        """Return the largest values over all ranks that hold a part of what shares a scale: every layout scales alike.

        Collective where that is so: all ranks of the tp and cp groups must call this.
        """
        tokens = 1 if transposed and block != _WHOLE else 0
        if role != "weight" and block[tokens] is None and self._cp_group is not None and self._cp_group.size() > 1:
            dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=self._cp_group)
        split = self._split[role]
        if split is not None and transposed and block != _WHOLE:
            split = 1 - split
        if split is not None and block[split] is None and self.tp_group.size() > 1:
            dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=self.tp_group)
        return amax

    def _tensor_amax(self, role: str, matrix: torch.Tensor, *, is_recording: bool) -> torch.Tensor | None:
        """Return the value that scales a whole operand `[1, 1]`, or None where its blocks have scales of their own."""
        if self.scheme.block(role) != _WHOLE:
            return None
        amax, history = compute_amax(matrix, _WHOLE), self.scheme.history
        if history is None:
            return self.agree(role, amax, _WHOLE, transposed=False)
        if is_recording:
            history.record(self._site, role, amax)
        if history.is_empty:  # the first step scales by what it sees, as there is nothing to remember yet
            return self.agree(role, amax.clone(), _WHOLE, transposed=False)
        past = history.amax(self._site, role).view(1, 1)
        # An infinity of today must not be cut to yesterday's range: adding it makes the scale NaN.
        return torch.where(past > 0, past, amax) + amax * 0


class _Function(torch.autograd.Function):
    """Forward and backward of `Fp8Linear`."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        weight: torch.Tensor,
        linear: Fp8Linear,
        has_backward: bool,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
    ) -> torch.Tensor:
        total = _start_gather(inputs, linear.tp_group, is_waiting=True)[0] if sequence_parallel else inputs
        x = total.reshape(-1, total.shape[-1])  # [tokens, in]
        weights = linear.weight_operand(weight)
        kept: tuple[torch.Tensor, ...] = (inputs,)
        ctx.amax = None
        if x.numel() == 0:  # an expert without tokens
            output = x.new_zeros(0, weight.shape[0])
        else:
            operand = linear.operand("input", x, is_recording=has_backward)
            output = linear.multiply(
                operand.get(transposed=False), weights.get(transposed=False), x.dtype, is_forward=True
            )
            ctx.amax = operand.amax
            if has_backward and weight.requires_grad and not sequence_parallel:  # half of what bf16 takes
                columns = operand.get(transposed=True)
                kept, ctx.block = (columns.data, columns.inverse_scale), columns.block
        ctx.save_for_backward(weight, *kept)
        ctx.linear, ctx.allreduce_dgrad, ctx.sequence_parallel = linear, allreduce_dgrad, sequence_parallel
        ctx.shape, ctx.dtype = inputs.shape, inputs.dtype
        return output.view(*total.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, *kept = ctx.saved_tensors
        linear, needs_weight = ctx.linear, ctx.needs_input_grad[1]
        gradient = gradients[0].reshape(-1, weight.shape[0]).contiguous()  # [tokens, out]
        if gradient.numel() == 0:
            nothing = torch.zeros(ctx.shape, dtype=ctx.dtype, device=gradient.device)
            return nothing, torch.zeros_like(weight) if needs_weight else None, *[None] * 4
        gathered, gathering = None, None
        if needs_weight and ctx.sequence_parallel:
            gathered, gathering = _start_gather(kept[0], linear.tp_group)
        operand = linear.operand("gradient", gradient, is_recording=True)
        weights = linear.weight_operand(weight).get(transposed=True)
        input_gradient = linear.multiply(operand.get(transposed=False), weights, ctx.dtype)
        input_gradient = input_gradient.view(*gradients[0].shape[:-1], weight.shape[1])
        result, reducing = input_gradient, None
        if ctx.allreduce_dgrad:
            reducing = dist.all_reduce(input_gradient, group=linear.tp_group, async_op=True)
        elif ctx.sequence_parallel:
            result = input_gradient.new_empty(ctx.shape)
            reducing = dist.reduce_scatter_tensor(result, input_gradient, group=linear.tp_group, async_op=True)
        weight_gradient = None
        if needs_weight:
            if gathering is not None and gathered is not None:
                gathering.wait()
                columns = Operand(linear, "input", gathered.reshape(-1, gathered.shape[-1]), ctx.amax)
                right = columns.get(transposed=True)
            else:
                right = Quantized(kept[0], kept[1], ctx.block)
            weight_gradient = linear.multiply(operand.get(transposed=True), right, weight.dtype)
        if reducing is not None:
            reducing.wait()
        return result, weight_gradient, *[None] * 4


def _start_gather(part: torch.Tensor, group: Any, *, is_waiting: bool = False) -> tuple[torch.Tensor, Any]:
    """Begin to gather the sequence, which sp splits over tp; return the whole and what to wait for."""
    whole = part.new_empty(part.shape[0] * group.size(), *part.shape[1:])
    gathering = dist.all_gather_into_tensor(whole, part.contiguous(), group=group, async_op=True)
    if is_waiting:
        gathering.wait()
    return whole, gathering
