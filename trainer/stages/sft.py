"""Supervised fine-tuning: cross-entropy of what is trained of conversations, by token or by conversation."""

from __future__ import annotations

from typing import Any

import torch

from configs.sections.sft import SftSection
from configs.stages import SftConfig
from trainer.data.batch import Batch, with_document_lengths, with_sample_weights
from trainer.engine.build import POLICY
from trainer.engine.engine import Engine
from trainer.engine.forward import forward_language_model, score_language_model
from trainer.evaluate.answers import AnswerEvaluator
from trainer.evaluate.validation import Evaluator
from trainer.losses.cross_entropy import compute_cross_entropy, count_tokens
from trainer.losses.loss import Loss, Mean
from trainer.model.embedding_noise import noisy_embeddings
from trainer.model.token_scores import TokenScores
from trainer.stages.base import StageContext
from trainer.stages.training import TrainingStage

ACCURACY = "accuracy"
CROSS_ENTROPY = "cross_entropy"
"""Of training with label smoothing: the loss without it."""


class ConversationObjective:
    """Cross-entropy in nats of trained tokens, weighed alike by token or by sample (`sft.weighting`)."""

    def __init__(self, sft: SftSection) -> None:
        self._sft = sft
        self.mean_names: tuple[str, ...] = (CROSS_ENTROPY,) if sft.label_smoothing else ()

    @property
    def is_by_sample(self) -> bool:
        """Whether samples weigh alike, whatever their length."""
        return self._sft.weighting == "sample"

    def finish(self, batch: Batch) -> Batch:
        """Return a microbatch with the columns that this objective needs, made before cp ranks share its rows."""
        if self._sft.neftune_alpha:
            batch = with_document_lengths(batch)
        return with_sample_weights(batch) if self.is_by_sample else batch

    def forward(self, model: Any, batch: Batch) -> torch.Tensor:
        """Return per-token losses `[batch, seq]`; with label smoothing `[2, batch, seq]`, those without it second."""
        with noisy_embeddings(model, batch.columns.get("lengths"), self._sft.neftune_alpha):
            return forward_language_model(model, batch, label_smoothing=self._sft.label_smoothing)

    def loss(self, output: torch.Tensor, batch: Batch) -> Loss:
        """Return the summed loss of one microbatch, and with label smoothing the one without it."""
        weights = batch.columns.get("weights")
        if not self.mean_names:
            return compute_cross_entropy(output, batch.loss_mask, weights)
        smoothed, plain = (compute_cross_entropy(one, batch.loss_mask, weights).total for one in output.unbind())
        return Loss(smoothed, {CROSS_ENTROPY: Mean(plain, self.count(batch))})

    def count(self, batch: Batch) -> torch.Tensor:
        """Return the number of trained tokens, or of samples whose last trained token is here."""
        return batch.columns["ends"].sum(dtype=torch.int32) if self.is_by_sample else count_tokens(batch.loss_mask)


class ConversationEvaluation(ConversationObjective):
    """The same without noise and smoothing, and the share of trained tokens that the model would choose itself."""

    def __init__(self, sft: SftSection) -> None:
        super().__init__(sft)
        self.mean_names = (ACCURACY,)

    def forward(self, model: Any, batch: Batch) -> torch.Tensor:
        """Return `[2, batch, seq]`: per-token losses, and 1 where the label has the largest logit."""
        scores = score_language_model(model, batch, is_greedy=True)
        if not isinstance(scores, TokenScores):
            return scores  # hidden states, on their way to the next pipeline stage
        assert scores.is_greedy is not None
        return torch.stack([-scores.log_probs, scores.is_greedy.float()])

    def loss(self, output: torch.Tensor, batch: Batch) -> Loss:
        """Return the summed loss of one microbatch, and the sum of right choices."""
        losses, is_greedy = output.unbind()
        right = torch.where(batch.loss_mask > 0, is_greedy, 0.0).sum()
        total = compute_cross_entropy(losses, batch.loss_mask, batch.columns.get("weights")).total
        return Loss(total, {ACCURACY: Mean(right, count_tokens(batch.loss_mask))})


def build_sft_stage(context: StageContext) -> TrainingStage:
    """Return the stage that reads packed conversations in order."""
    config, corpus, mesh, engine = context.config, context.corpus, context.mesh, context.models[POLICY]
    assert isinstance(engine, Engine) and isinstance(config, SftConfig)
    objective, evaluated = ConversationObjective(config.sft), ConversationEvaluation(config.sft)
    reader = corpus.build_reader(dp_rank=mesh.dp_rank, dp_size=mesh.dp_size, finish=objective.finish)
    readers = corpus.build_validation_readers(dp_rank=mesh.dp_rank, dp_size=mesh.dp_size, finish=evaluated.finish)
    answers = None
    if config.sft.num_answers and config.sft.train_on != "all" and corpus.tokenizer is not None:
        sft = config.sft
        answers = AnswerEvaluator(corpus.validation, corpus.tokenizer, sft.num_answers, sft.max_answer_tokens)
    return TrainingStage("sft", engine, reader, objective, Evaluator(readers, answers), evaluated)
