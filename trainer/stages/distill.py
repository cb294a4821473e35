"""Distillation: a student learns a frozen teacher's distributions, over answers of the data or over its own."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch

from configs.roles import POLICY, TEACHER
from configs.stages import DistillConfig, Split
from trainer.data.batch import Batch
from trainer.data.corpus import Corpus
from trainer.data.indexed import TokenDataset
from trainer.engine.engine import Engine
from trainer.engine.forward import diverge_language_model
from trainer.engine.state import StepResult, TrainState
from trainer.evaluate.answers import AnswerEvaluator
from trainer.evaluate.validation import Evaluator
from trainer.losses.cross_entropy import compute_cross_entropy, count_tokens
from trainer.losses.distillation import compute_distillation, diverge
from trainer.losses.loss import Loss, Mean
from trainer.rl.student import StudentAnswers, open_student
from trainer.rl.teacher import AT_ONCE, LiveTeacher, Teacher
from trainer.rl.teacher_cache import CachedTeacher
from trainer.stages.base import StageContext
from trainer.stages.sft import CROSS_ENTROPY, ConversationObjective
from trainer.stages.training import StepReader, TrainingStage

DIVERGENCE, KL = "divergence", "kl"
"""The divergence that is minimised, and KL(teacher || student), a token's mean, both at `distill.temperature`."""


class DistillObjective(ConversationObjective):
    """The divergence from the teacher and the cross-entropy of the labels, in nats, over trained tokens."""

    def __init__(self, config: DistillConfig, teacher: Teacher) -> None:
        super().__init__(config.sft)
        self._teacher, self._label_weight = teacher, config.distill.label_weight
        self._diverge: tuple[Any, ...] = (partial(diverge, beta=config.distill.beta),)
        self._has_labels = self._label_weight > 0
        self.mean_names = (DIVERGENCE, *((CROSS_ENTROPY,) if self._has_labels else ()))

    def forward(self, model: Any, batch: Batch) -> torch.Tensor:
        """Return `[num_outputs, batch, seq]`: divergences and losses of the labels; hidden states but from the last."""
        lesson = self._teacher.lesson(batch, self._diverge, has_labels=self._has_labels)
        return diverge_language_model(model, batch, lesson)

    def loss(self, output: torch.Tensor, batch: Batch) -> Loss:
        """Return the summed loss of one microbatch, and what it is made of."""
        figures = dict(zip(self.mean_names, output.unbind(), strict=True))
        total = compute_distillation(
            figures[DIVERGENCE],
            figures.get(CROSS_ENTROPY),
            batch.loss_mask,
            temperature=self._teacher.temperature,
            label_weight=self._label_weight,
            weights=batch.columns.get("weights"),
        ).total
        count = count_tokens(batch.loss_mask)
        means = {
            name: Mean(compute_cross_entropy(one.detach(), batch.loss_mask).total, count)
            for name, one in figures.items()
        }
        return Loss(total, means)


class DistillEvaluation(DistillObjective):
    """The same, with the cross-entropy of the labels and KL(teacher || student) always beside it."""

    def __init__(self, config: DistillConfig, teacher: Teacher) -> None:
        super().__init__(config, teacher)
        self._diverge = (*self._diverge, partial(diverge, beta=0.0))
        self._has_labels = True
        self.mean_names = (DIVERGENCE, KL, CROSS_ENTROPY)


class DistillStage(TrainingStage):
    """One update a step, on the data or on answers of the student."""

    def __init__(
        self,
        config: DistillConfig,
        engine: Engine,
        reader: StepReader | None,
        evaluator: Evaluator,
        teacher: Teacher,
        student: StudentAnswers | None,
    ) -> None:
        """With a `student` some steps are on its own answers, whose labels say nothing."""
        objective, evaluated = DistillObjective(config, teacher), DistillEvaluation(config, teacher)
        super().__init__("distill", engine, reader, objective, evaluator, evaluated, prepare=teacher.annotate)
        without_labels = config.distill.model_copy(update={"label_weight": 0.0})
        self._judged = DistillObjective(config.model_copy(update={"distill": without_labels}), teacher)
        self._student = student

    def step(self, state: TrainState) -> StepResult:
        """Train on the next global batch, of the data or of answers. Collective: all ranks of the world."""
        step = state.step + 1
        if self._student is None or not self._student.is_due(step):
            return super().step(state)
        started = time.perf_counter()
        rollouts = self._student.answer(step)
        answered = time.perf_counter()
        batches = [self._judged.finish(batch) for batch in self._student.lay(rollouts)]
        seconds = {"data": time.perf_counter() - answered, "generate": answered - started}
        result = self._learn(batches, state, seconds, self._judged)
        records = self._student.record(step, rollouts)
        return dataclasses.replace(result, num_samples=len(rollouts), rollouts=records)

    def state_dict(self) -> Mapping[str, Any]:
        """Return the cursors of the data and of the prompts."""
        prompts = None if self._student is None else self._student.reader.state_dict()
        return {**super().state_dict(), "prompts": prompts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the cursors."""
        super().load_state_dict(state)
        if self._student is not None and state["prompts"] is not None:
            self._student.reader.load_state_dict(state["prompts"])


def build_distill_stage(context: StageContext) -> DistillStage:
    """Return the stage with its teacher, which is a model of the run or a cache. Raises BadInput for what cannot be."""
    config, corpus, mesh, engine = context.config, context.corpus, context.mesh, context.models[POLICY]
    assert isinstance(engine, Engine) and isinstance(config, DistillConfig)
    distill, sft = config.distill, config.sft
    teacher: LiveTeacher | CachedTeacher
    finishers = [ConversationObjective(sft).finish]
    if distill.cache is None:
        model = context.models[TEACHER]
        num_ids = model.config.model.vocab_size
        is_less = num_ids < config.model.vocab_size
        teacher = LiveTeacher(model, distill.temperature, distill.top_k, num_ids if is_less else None)
    else:
        teacher = _open_cache(config, corpus, is_last_pp_stage=mesh.is_last_pp_stage)
        finishers.append(teacher.finish)

    def finish(batch: Batch) -> Batch:
        return reduce(lambda found, one: one(found), finishers, batch)

    ranks: Any = {"dp_rank": mesh.dp_rank, "dp_size": mesh.dp_size, "finish": finish}
    answers = student = None
    if not config.is_of_text and corpus.tokenizer is not None and sft.train_on != "all":
        if sft.num_answers:
            answers = AnswerEvaluator(corpus.validation, corpus.tokenizer, sft.num_answers, sft.max_answer_tokens)
        if distill.lmbda:
            student = open_student(config, engine, corpus.tokenizer)
    evaluator = Evaluator(
        corpus.build_validation_readers(**ranks),
        answers,
        prepare=teacher.annotate,
        has_perplexity=False,
        at_once=AT_ONCE,
    )
    return DistillStage(config, engine, corpus.build_reader(**ranks), evaluator, teacher, student)


def _open_cache(config: DistillConfig, corpus: Corpus, *, is_last_pp_stage: bool) -> CachedTeacher:
    """Return what a teacher said of the data. Raises BadInput where it was written of other data or tokens."""
    assert config.distill.cache is not None and corpus.tokenizer is not None
    teacher = CachedTeacher(Path(config.distill.cache), is_last_pp_stage=is_last_pp_stage)
    teacher.check(
        vocab_size=config.model.vocab_size,
        seq_len=config.train.seq_len,
        temperature=config.distill.temperature,
        tokenizer=corpus.tokenizer.vocabulary_hash,
    )
    trained = [source.dataset for source in (corpus.blend.sources if corpus.blend is not None else ())]
    splits: tuple[tuple[Split, list[TokenDataset]], ...] = (
        ("train", trained),
        ("validation", list(corpus.validation.values())),
    )
    for split, datasets in splits:
        for dataset in datasets:
            teacher.check_source(config.source_field(split), dataset.origin, dataset.identity)
    return teacher
