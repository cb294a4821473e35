"""The loss of each token from the last hidden states, without the logits of a whole microbatch.

Logits in fp32 of 8192 tokens over Llama 3's 128256 ids take 4.2 GB. Here they are made a piece of the sequence at a
time, and once more for the backward pass; where they are small they are kept, as one piece.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from configs.plan.logits import num_logit_pieces


def compute_token_losses(
    *,
    hidden_states: torch.Tensor,
    output_layer: Any,
    output_weight: torch.Tensor | None,
    labels: torch.Tensor,
    compute_language_model_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    **unused: Any,
) -> torch.Tensor:
    """Return the losses `[batch, seq/cp]` in nats: an output processor of Megatron-Core's `GPTModel`.

    hidden_states `[seq/cp, batch, hidden]`, with sp `[seq/(cp*tp), batch, hidden]`; labels `[batch, seq/cp]`. With a
    vocabulary split over tp the losses are the same on all of its ranks.
    """

    def losses_of(hidden: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        logits, _ = output_layer(hidden, weight=output_weight)
        return compute_language_model_loss(wanted, logits)

    weight = output_layer.weight if output_weight is None else output_weight
    pieces = num_logit_pieces(labels.numel(), weight.shape[0])
    if pieces == 1:
        return losses_of(hidden_states, labels)
    # With sp a piece of every tp rank's part is gathered, so that labels are taken alike.
    parts = labels.shape[1] // hidden_states.shape[0]
    by_part = labels.unflatten(1, (parts, -1))  # [batch, tp or 1, seq/(cp*tp)]
    losses = [
        checkpoint(losses_of, hidden, wanted.flatten(1), use_reentrant=False).unflatten(1, (parts, -1))
        for hidden, wanted in zip(hidden_states.chunk(pieces), by_part.chunk(pieces, dim=2), strict=True)
    ]
    total = torch.cat(losses, dim=2).flatten(1)
    is_fused = output_layer.config.gradient_accumulation_fusion and hasattr(weight, "grad_added_to_main_grad")
    return _WeightGradientAdded.apply(total, weight) if is_fused else total


class _WeightGradientAdded(torch.autograd.Function):
    """Tells data parallelism, as Megatron-Core's linear layers do, that a weight's gradient is where it belongs.

    They mark the weight and return a gradient of no meaning for it; a checkpoint's recomputation has a copy of the
    weight, without the mark.
    """

    @staticmethod
    def forward(ctx: Any, losses: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return the losses."""
        ctx.weight = weight
        return losses.view_as(losses)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mark the weight; of a weight that is the embedding too, what is returned is added to its gradient."""
        ctx.weight.grad_added_to_main_grad = True
        make = torch.zeros_like if getattr(ctx.weight, "zero_out_wgrad", False) else torch.empty_like
        return gradient, make(ctx.weight)
