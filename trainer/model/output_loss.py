"""The loss or scores of each token from the last hidden states, without the logits of a whole microbatch.

Logits in fp32 of 8192 tokens over Llama 3's 128256 ids take 4.2 GB. Here they are made a piece of the sequence at a
time, and once more for the backward pass; where they are small they are kept, as one piece.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from configs.plan.logits import num_logit_pieces
from trainer.model.label_smoothing import label_over_mean
from trainer.model.token_scores import Scoring, TokenScores, score_logits


def compute_token_losses(
    *,
    hidden_states: torch.Tensor,
    output_layer: Any,
    output_weight: torch.Tensor | None,
    labels: torch.Tensor,
    compute_language_model_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    context: float | None = None,
    **unused: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Return the losses `[batch, seq/cp]` in nats: an output processor of Megatron-Core's `GPTModel`.

    hidden_states `[seq/cp, batch, hidden]`, with sp `[seq/(cp*tp), batch, hidden]`; labels `[batch, seq/cp]`. With a
    vocabulary split over tp the losses are the same on all of its ranks. `context` is the share of label smoothing;
    with one, the losses of the smoothed target come first, and then those of the label alone, without a gradient.
    """

    def losses_of(hidden: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits, _ = output_layer(hidden, weight=output_weight)
        if not context:
            return (compute_language_model_loss(wanted, logits),)
        excess = label_over_mean(logits, wanted, output_layer)  # first: the loss may write over the logits
        losses = compute_language_model_loss(wanted, logits)
        return losses + context * excess, losses.detach()

    weight = output_layer.weight if output_weight is None else output_weight
    losses, *plain = compute_in_pieces(losses_of, hidden_states, (labels,), output_layer, weight)
    return (losses, plain[0]) if plain else losses


def compute_token_scores(
    *,
    hidden_states: torch.Tensor,
    output_layer: Any,
    output_weight: torch.Tensor | None,
    labels: torch.Tensor,
    context: Scoring,
    **unused: Any,
) -> TokenScores:
    """Return what `context` asks of the labels: an output processor like `compute_token_losses`, in the same shapes."""
    config, group = output_layer.config, output_layer.tp_group

    def scores_of(hidden: torch.Tensor, wanted: torch.Tensor) -> TokenScores:
        logits, _ = output_layer(hidden, weight=output_weight)
        return score_logits(logits, wanted, context, group, is_compiled=config.cross_entropy_loss_fusion)

    weight = output_layer.weight if output_weight is None else output_weight
    return TokenScores(*compute_in_pieces(scores_of, hidden_states, (labels,), output_layer, weight))


def compute_in_pieces(
    compute: Callable[..., tuple[Any, ...]],
    hidden_states: torch.Tensor,
    targets: Sequence[torch.Tensor],
    output_layer: Any,
    weight: torch.Tensor,
    *,
    num_logits: int = 1,
) -> tuple[Any, ...]:
    """Return what `compute` gives of hidden states and of their targets, `[batch, seq/cp]` each or None.

    Targets are `[batch, seq/cp, ...]`, such as labels; each piece has those of its tokens. `num_logits` is by how much
    `compute` needs more room than a loss does.
    """
    pieces = num_logit_pieces(num_logits * targets[0].shape[0] * targets[0].shape[1], weight.shape[0])
    if pieces == 1:
        return compute(hidden_states, *targets)
    # With sp a piece of every tp rank's part is gathered, so that targets are taken alike.
    parts = targets[0].shape[1] // hidden_states.shape[0]
    by_part = [one.unflatten(1, (parts, -1)).chunk(pieces, dim=2) for one in targets]  # [batch, tp or 1, seq/(cp*tp)]
    found = [
        checkpoint(compute, hidden, *(one.flatten(1, 2) for one in wanted), use_reentrant=False)
        for hidden, *wanted in zip(hidden_states.chunk(pieces), *by_part, strict=True)
    ]
    whole = tuple(_join(outputs, parts) for outputs in zip(*found, strict=True))
    is_fused = output_layer.config.gradient_accumulation_fusion and hasattr(weight, "grad_added_to_main_grad")
    return _WeightGradientAdded.apply(weight, *whole) if is_fused else whole


def _join(outputs: Sequence[torch.Tensor | None], parts: int) -> torch.Tensor | None:
    """Return the pieces of one output, of which each has a piece of every part, in the order of the labels."""
    there = [output.unflatten(1, (parts, -1)) for output in outputs if output is not None]
    return torch.cat(there, dim=2).flatten(1, 2) if there else None


class _WeightGradientAdded(torch.autograd.Function):
    """Tells data parallelism, as Megatron-Core's linear layers do, that a weight's gradient is where it belongs.

    They mark the weight and return a gradient of no meaning for it; a checkpoint's recomputation has a copy of the
    weight, without the mark.
    """

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, *values: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Return the values."""
        ctx.weight = weight
        ctx.set_materialize_grads(False)
        views = tuple(value if value is None else value.view_as(value) for value in values)
        ctx.mark_non_differentiable(*(view for view in views if view is not None and not view.is_floating_point()))
        return views

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Mark the weight; of a weight that is the embedding too, what is returned is added to its gradient."""
        ctx.weight.grad_added_to_main_grad = True
        make = torch.zeros_like if getattr(ctx.weight, "zero_out_wgrad", False) else torch.empty_like
        return make(ctx.weight), *gradients
