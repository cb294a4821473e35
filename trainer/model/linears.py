"""Linear layers of Megatron-Core without what only a backward pass or several ranks need. Bit for bit the same,
but for weights that generation has packed.

With one new token a row, as in generation, the wrappers around a multiplication take as long as it does.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel import layers

from trainer.model.packed_weights import multiply_packed

_sizes: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_reduce, _copy = layers.reduce_from_tensor_model_parallel_region, layers.copy_to_tensor_model_parallel_region


def forward_without_gradients(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return a layer's `_forward_impl` that multiplies at once where no gradients are asked for.

    input `[seq, batch, in]`, weight `[out/tp, in]` -> `[seq, batch, out/tp]`.
    """

    def multiply(layer: Any, input: torch.Tensor, weight: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        if torch.is_grad_enabled() or args or options.get("sequence_parallel") or weight.dtype != input.dtype:
            return forward(layer, input, weight, *args, **options)
        output = multiply_packed(input, weight)
        if output is None:
            output = torch.nn.functional.linear(input, weight)
        bias = options.get("bias")
        return output if bias is None else output + bias

    return multiply


def reduce_over_tp(values: torch.Tensor, group: Any = None) -> torch.Tensor:
    """Sum over the tp ranks, if there are several; gradients are copied."""
    return values if _is_alone(group) else _reduce(values, group=group)


def copy_to_tp(values: torch.Tensor, group: Any = None) -> torch.Tensor:
    """Copy to the tp ranks, if there are several; gradients are summed."""
    return values if _is_alone(group) else _copy(values, group=group)


def _is_alone(group: Any) -> bool:
    """Return whether a group is of one rank; asking the group itself takes as long as a small kernel."""
    if group is None:
        return False
    size = _sizes.get(group)
    if size is None:
        size = _sizes[group] = group.size()
    return size == 1
