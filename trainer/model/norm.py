"""RMSNorm and LayerNorm on torch's own kernels, for layers built without Transformer Engine.

Megatron-Core's wrapper refuses sequence parallelism; all it takes is the `sequence_parallel` mark on the weights,
by which their gradients are summed over tp.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


def _mark(module: torch.nn.Module, config: TransformerConfig) -> None:
    for parameter in module.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class RMSNorm(torch.nn.RMSNorm):
    """Root-mean-square normalisation (arXiv:1910.07467) over the last dimension of `[seq, batch, hidden]`."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        _mark(self, config)


class LayerNorm(torch.nn.LayerNorm):
    """Layer normalisation (arXiv:1607.06450) over the last dimension of `[seq, batch, hidden]`."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        _mark(self, config)
