"""Weights laid out anew, by the platform, for products with few tokens: while generation multiplies by them unchanged.

A product of so few tokens takes as long as its weight is read, in an order that suits the products of training.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

Multiply = Callable[[torch.Tensor], torch.Tensor]
Pack = Callable[[torch.Tensor, int], Multiply | None]
PASSES_BEFORE = 8
"""Of one size, before weights are packed for it, which takes about as long as a pass and saves a fifteenth of each."""

_products: dict[int, Multiply] = {}  # by weight, for passes of `_num_tokens`
_num_tokens = 0


def multiply_packed(input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    """Return input `[tokens, 1, in]` times the transposed weight `[out, in]`, if it is packed for so many tokens."""
    multiply = _products.get(id(weight))
    return None if multiply is None or input.numel() != _num_tokens * weight.shape[1] else multiply(input)


@contextlib.contextmanager
def packing_weights(chunks: Sequence[Any], pack: Pack) -> Iterator[Callable[[int], None]]:
    """Yield what is to be told the tokens of each pass, and packs the linears of chunks when it has seen enough.

    `pack(weight, tokens)` returns what multiplies by a weight, or None where nothing is gained. Weights must not change
    within the context; packed ones, as large as they are, are freed at its end.
    """
    sizes: list[int] = []

    def see(num_tokens: int) -> None:
        global _num_tokens
        sizes.append(num_tokens)
        if num_tokens == _num_tokens or sizes[-PASSES_BEFORE:] != [num_tokens] * PASSES_BEFORE:
            return
        _products.clear()  # before there are others
        _num_tokens = num_tokens
        for weight in _find_weights(chunks):
            multiply = pack(weight, num_tokens)
            if multiply is not None:
                _products[id(weight)] = multiply

    try:
        yield see
    finally:
        _forget()


def _forget() -> None:
    global _num_tokens
    _num_tokens = 0
    _products.clear()


def _find_weights(chunks: Sequence[Any]) -> Iterator[torch.Tensor]:
    """Yield the weights by which all tokens of a pass are multiplied: not the experts', which take some each."""
    for chunk in chunks:
        for module in chunk.modules():
            is_linear = isinstance(module, ColumnParallelLinear | RowParallelLinear)
            if is_linear and module.weight is not None and not module.is_expert:
                yield module.weight
        if chunk.post_process and chunk.share_embeddings_and_output_weights:
            yield chunk.shared_embedding_or_output_weight()
