"""Next-token cross-entropy from per-token losses."""

from __future__ import annotations

import torch

from trainer.losses.loss import Loss


def compute_cross_entropy(
    token_losses: torch.Tensor, loss_mask: torch.Tensor, weights: torch.Tensor | None = None
) -> Loss:
    """Sum the per-token negative log-likelihoods in nats where the mask is 1, times `weights`; all `[batch, seq]`.

    Masked positions count for nothing even where their loss is not finite.
    """
    losses = token_losses.float() if weights is None else token_losses.float() * weights
    return Loss(torch.where(loss_mask > 0, losses, 0.0).sum())


def count_tokens(loss_mask: torch.Tensor) -> torch.Tensor:
    """Count the tokens of a mask `[batch, seq]` that `compute_cross_entropy` sums over, int32 scalar."""
    return (loss_mask > 0).sum(dtype=torch.int32)


def find_largest_logits(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `logits [seq, batch, vocab/tp]` in fp32 and the largest of each token, `[seq, batch]`, without its place.

    Where it lies is not asked for, and looking takes the CPU six times as long.
    """
    logits = logits.float()
    return logits, logits.amax(dim=-1)
