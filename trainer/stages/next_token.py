"""Next-token prediction: its objective, and the stages that consist of it (pretraining, long context)."""

from __future__ import annotations

from typing import Any

import torch

from trainer.data.batch import Batch
from trainer.engine.build import POLICY
from trainer.engine.engine import Engine
from trainer.engine.forward import forward_language_model
from trainer.evaluate.validation import Evaluator
from trainer.losses.cross_entropy import compute_cross_entropy, count_tokens
from trainer.losses.loss import Loss
from trainer.stages.base import StageContext
from trainer.stages.training import TrainingStage


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


def build_next_token_stage(name: str, context: StageContext) -> TrainingStage:
    """Return the stage that reads the blend in order and minimises the mean next-token loss."""
    corpus, mesh, engine = context.corpus, context.mesh, context.models[POLICY]
    assert isinstance(engine, Engine)
    reader = corpus.build_reader(dp_rank=mesh.dp_rank, dp_size=mesh.dp_size)
    evaluator = Evaluator(corpus.build_validation_readers(dp_rank=mesh.dp_rank, dp_size=mesh.dp_size))
    return TrainingStage(name, engine, reader, NextTokenObjective(), evaluator)
