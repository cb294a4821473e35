"""Learning from preferences: the losses of answers that stand side by side in packed rows, on one model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from configs.sections.preference import PreferenceMethod
from configs.stages import PreferenceConfig
from parallel.collectives import gather_objects
from trainer.data.batch import Batch
from trainer.data.packed_source import REJECTED
from trainer.data.sequences import with_sequences
from trainer.engine.build import POLICY
from trainer.engine.engine import Engine
from trainer.engine.state import TrainState
from trainer.evaluate.answers import AnswerEvaluator
from trainer.evaluate.validation import Evaluator
from trainer.losses import preference
from trainer.losses.loss import Loss
from trainer.rl.reference_scores import ReferenceScores, forward_log_probs, score_answers
from trainer.stages.base import StageContext
from trainer.stages.comparisons import sum_answers, sum_comparisons
from trainer.stages.training import StepReader, TrainingStage

_PAIR_FIGURES = (
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected",
)  # fmt: skip
_SINGLE_FIGURES = ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "kl")
"""By TRL's names; of single answers the good ones are the chosen."""


class PreferenceObjective:
    """The mean loss of a comparison: of a pair of answers, or with KTO of an answer."""

    def __init__(self, method: PreferenceMethod, reference: ReferenceScores, cp_group: dist.ProcessGroup) -> None:
        self._method, self._reference, self._cp_group = method, reference, cp_group
        self.mean_names: tuple[str, ...] = _SINGLE_FIGURES if method.loss == "kto" else _PAIR_FIGURES

    def finish(self, batch: Batch) -> Batch:
        """Return a microbatch with its answers numbered, and what the reference says of them."""
        batch = with_sequences(batch)
        if not self._method.has_reference:
            return batch
        return dataclasses.replace(batch, sequences={**batch.sequences, "reference": self._reference.look_up(batch)})

    def prepare(self, engine: Engine, batches: Sequence[Batch]) -> list[Batch]:
        """Return the microbatches of one global batch with the divergence that KTO compares with, else as they are.

        Its estimate is the mean log-ratio of mismatched answers, at least 0 (arXiv:2402.01306, section 4.1), here over
        the global batch. Collective: all ranks of the world must call this.
        """
        if self._method.loss != "kto":
            return list(batches)
        found = []
        for batch, own in zip(batches, score_answers(engine, batches) or (), strict=False):
            is_counted = torch.zeros(len(own), dtype=torch.bool)
            is_counted[batch.columns["sequence"][batch.columns["ends"] > 0] + 1] = True
            found += (own - batch.sequences["reference"])[is_counted].tolist()
        ratios = [ratio for part in gather_objects(found) for ratio in part]
        divergence = torch.tensor([max(float(np.mean(ratios)), 0.0) if ratios else 0.0])
        return [
            dataclasses.replace(batch, sequences={**batch.sequences, "divergence": divergence}) for batch in batches
        ]

    def forward(self, model: Any, batch: Batch) -> torch.Tensor:
        """Return log-probabilities of the labels `[batch, seq]`; hidden states but from the last chunk."""
        return forward_log_probs(model, batch)

    def loss(self, output: torch.Tensor, batch: Batch) -> Loss:
        """Return the summed loss of one microbatch's comparisons. Collective: all cp ranks must call this."""
        sums, is_here = sum_answers(output, batch, self._cp_group)
        if self._method.loss == "kto":
            losses, figures = self._judge_single(sums, batch)
        else:
            losses, figures = self._judge_pairs(sums, batch)
        return sum_comparisons(losses, figures, is_here)

    def count(self, batch: Batch) -> torch.Tensor:
        """Return the number of comparisons whose last token of the first answer is here."""
        return batch.columns["ends"].sum(dtype=torch.int32)

    def _judge_pairs(self, sums: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict[str, Any]]:
        """Return the loss of each pair, and its figures with their weights."""
        method = self._method
        num_tokens = batch.sequences["num_tokens"]
        if method.has_reference:
            values = sums - batch.sequences["reference"]
        else:
            values = sums / num_tokens
        (chosen, rejected), (chosen_tokens, rejected_tokens) = values.view(-1, 2).t(), num_tokens.view(-1, 2).t()
        if method.loss in ("dpo", "cdpo"):
            smoothing = method.label_smoothing if method.loss == "cdpo" else 0.0
            losses = preference.dpo(chosen, rejected, method.beta, smoothing)
        elif method.loss == "rdpo":
            alpha = method.length_penalty
            losses = preference.rdpo(chosen, rejected, chosen_tokens, rejected_tokens, method.beta, alpha)
        elif method.loss == "ipo":
            losses = preference.ipo(chosen, rejected, chosen_tokens, rejected_tokens, method.beta)
        elif method.loss == "simpo":
            losses = preference.simpo(chosen, rejected, method.beta, method.target_margin)
        else:
            losses = getattr(preference, method.loss)(chosen, rejected, method.beta)
        log_probs = sums.view(-1, 2).t()
        if method.sft_weight:
            losses = losses - method.sft_weight * log_probs[0] / chosen_tokens
        rewards = method.beta * values.detach().view(-1, 2).t()
        margins = rewards[0] - rewards[1]
        figures = (rewards[0], rewards[1], (margins > 0).float(), margins, *log_probs.detach())
        return losses, {name: (one, torch.ones_like(one)) for name, one in zip(_PAIR_FIGURES, figures, strict=True)}

    def _judge_single(self, sums: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict[str, Any]]:
        """Return KTO's loss of each answer, and its figures with their weights: of good answers, or of bad ones."""
        method, side = self._method, batch.sequences["side"]
        ratios, divergence = (sums - batch.sequences["reference"])[::2], batch.sequences["divergence"]
        is_good = side[::2] != REJECTED
        losses = preference.kto(
            ratios, is_good, divergence, method.beta, method.desirable_weight, method.undesirable_weight
        )
        rewards, log_probs = method.beta * ratios.detach(), sums.detach()[::2]
        good, bad = is_good.float(), (~is_good).float()
        figures = (
            (rewards * good, good), (rewards * bad, bad), (log_probs * good, good), (log_probs * bad, bad),
            (divergence.expand(len(ratios)), torch.ones_like(good)),
        )  # fmt: skip
        return losses, dict(zip(_SINGLE_FIGURES, figures, strict=True))


class PreferenceStage(TrainingStage):
    """One update a step, held to what the model said before the first of them."""

    def __init__(
        self,
        engine: Engine,
        reader: StepReader | None,
        objective: PreferenceObjective,
        evaluator: Evaluator,
        reference: ReferenceScores | None,
        unscored: Sequence[Any],
    ) -> None:
        """`unscored` are readers of everything that the run reads, for the reference; None for none."""
        super().__init__("preference", engine, reader, objective, evaluator, prepare=objective.prepare)
        self._reference, self._unscored = reference, unscored
        if reference is not None:
            self.parts = {**self.parts, "reference": reference}

    def start(self, state: TrainState) -> None:
        """Score all answers by the present weights, unless a checkpoint has brought that. Collective: all ranks."""
        if self._reference is not None and not self._reference.is_known:
            self._reference.remember(self._engine, self._unscored)
        super().start(state)


def build_preference_stage(context: StageContext) -> PreferenceStage:
    """Return the stage that reads packed comparisons in order."""
    config, corpus, mesh, engine = context.config, context.corpus, context.mesh, context.models[POLICY]
    assert isinstance(engine, Engine) and isinstance(config, PreferenceConfig)
    section, method = config.preference, config.preference.method
    reference = ReferenceScores(mesh)
    objective = PreferenceObjective(method, reference, mesh.cp_group)
    ranks: Any = {"dp_rank": mesh.dp_rank, "dp_size": mesh.dp_size}
    reader = corpus.build_reader(**ranks, finish=objective.finish)
    readers = corpus.build_validation_readers(**ranks, finish=objective.finish)
    unscored = [
        *corpus.build_whole_readers(**ranks, finish=with_sequences),
        *corpus.build_validation_readers(**ranks, finish=with_sequences).values(),
    ]
    answers = None
    if section.num_answers and section.loss != "kto" and corpus.tokenizer is not None:
        chosen = {
            name: dataset.subset(np.arange(0, dataset.num_documents, 2), dataset.prefix, "/chosen")
            for name, dataset in corpus.validation.items()
        }
        answers = AnswerEvaluator(chosen, corpus.tokenizer, section.num_answers, section.max_answer_tokens)
    evaluator = Evaluator(readers, answers, prepare=objective.prepare, has_perplexity=False)
    held = reference if method.has_reference else None
    return PreferenceStage(engine, reader, objective, evaluator, held, unscored)
