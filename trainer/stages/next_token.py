"""The objective of language models: the mean next-token loss over the tokens that count."""

from __future__ import annotations

from typing import Any

import torch

from trainer.data.batch import Batch
from trainer.losses.cross_entropy import compute_cross_entropy, count_tokens
from trainer.losses.loss import Loss
from trainer.stages.forward import forward_language_model


class NextTokenObjective:
    """Cross-entropy in nats, every counted token weighed alike."""

    mean_names: tuple[str, ...] = ()

    def forward(self, model: Any, batch: Batch) -> torch.Tensor:
        """Return per-token losses."""
        return forward_language_model(model, batch)

    def loss(self, output: torch.Tensor, batch: Batch) -> Loss:
        """Return the summed cross-entropy over unmasked tokens."""
        return compute_cross_entropy(output, batch.loss_mask)

    def count(self, batch: Batch) -> torch.Tensor:
        """Return the number of unmasked tokens."""
        return count_tokens(batch.loss_mask)
