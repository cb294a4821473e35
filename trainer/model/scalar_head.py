"""The head of reward models and critics: one value a token in the place of the logits."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig


class ScalarHead(torch.nn.Module):
    """A linear layer `hidden -> 1` without a bias, the same on all tp ranks; its arithmetic and values are fp32.

    It begins as N(0, 1 / (hidden + 1)) (Stiennon et al., arXiv:2009.01325, appendix B.1), drawn from the run's seed
    alike on every layout.
    """

    def __init__(self, config: TransformerConfig, tp_group: Any, device: torch.device, seed: int) -> None:
        super().__init__()
        self._is_split, self._tp_group = config.sequence_parallel, tp_group
        digest = hashlib.sha256(f"{seed} scalar head".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
        std = 1.0 / math.sqrt(config.hidden_size + 1)
        weight = torch.empty(1, config.hidden_size).normal_(0.0, std, generator=generator)
        self.weight = torch.nn.Parameter(weight.to(device, config.params_dtype))
        # By this mark Megatron-Core sums the gradients of the parts of the sequence over tp.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the values `[seq/cp, batch]` of hidden states `[seq/cp, batch, hidden]`, with sp `[seq/(cp*tp), ...]`.

        Collective with sp: all tp ranks must call this. They compute the same loss of all values, so that each has the
        gradient of its own part already.
        """
        values = torch.nn.functional.linear(hidden_states.float(), self.weight.float()).squeeze(-1)
        if not self._is_split:
            return values
        return gather_from_sequence_parallel_region(values, tensor_parallel_output_grad=False, group=self._tp_group)


def compute_values(*, hidden_states: torch.Tensor, output_layer: Any, **unused: Any) -> torch.Tensor:
    """Return the fp32 values `[batch, seq/cp]`: an output processor of `GPTModel` with a `ScalarHead`."""
    return output_layer(hidden_states).transpose(0, 1).contiguous()
