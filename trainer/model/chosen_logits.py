"""Logits of some of a pass's tokens: what generation needs of a prompt is its last token's."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region


def compute_chosen_logits(
    *, hidden_states: torch.Tensor, output_layer: Any, output_weight: torch.Tensor | None, context: Any, **unused: Any
) -> torch.Tensor:
    """Return the logits `[chosen, vocab/tp]` of the tokens `context`: an output processor of `GPTModel`.

    hidden_states `[tokens, 1, hidden]`, with sp a tp rank's part of them; `context` is an index or a slice. Without
    gradients.
    """
    is_split = output_layer.sequence_parallel
    if is_split:
        hidden_states = gather_from_sequence_parallel_region(hidden_states, group=output_layer.tp_group)
    output_layer.sequence_parallel = False
    try:
        logits, _ = output_layer(hidden_states[context], weight=output_weight)
    finally:
        output_layer.sequence_parallel = is_split
    return logits.squeeze(1)
