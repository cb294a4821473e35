"""Greedy answers to held-out prompts, as the model gives them at inference, beside those that the data has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.data.indexed import TokenDataset
from trainer.data.tokenizer import Tokenizer
from trainer.engine.sharded_model import ShardedModel
from trainer.generate.generator import EngineGenerator
from trainer.generate.sampling import Sampling

EXACT_ANSWERS = "validation_exact_answers/"
"""The share of answers that are, token by token, those of the data."""


@dataclass(frozen=True)
class Question:
    """The last trained turn of a sample, and what comes before it."""

    prompt_ids: list[int]
    answer_ids: list[int]
    """To the token that ends the turn, which is the last."""


@dataclass(frozen=True)
class ScoredAnswer:
    """What the model says, and what that is worth."""

    source: str
    prompt: str
    answer: str
    score: float | None
    """None where a reward failed."""
    rewards: Mapping[str, float | None]


@dataclass(frozen=True)
class Answer:
    """What the model says."""

    source: str
    prompt: str
    answer: str
    expected: str
    is_exact: bool


Spoken = Answer | ScoredAnswer


def read_questions(dataset: TokenDataset, num_questions: int, longest: int, seq_len: int) -> list[Question]:
    """Return the questions of the first samples whose prompt and answer are together at most `longest` tokens.

    Left out is a sample whose last trained token is the last that a row of `seq_len` predictions holds: it may have
    been cut there, and its last token would not be what ends a turn.
    """
    questions: list[Question] = []
    for document, length in enumerate(dataset.lengths.tolist()):
        if len(questions) == num_questions:
            break
        mask = dataset.read_mask(document, 0, length)
        trained = np.flatnonzero(mask) if mask is not None else np.arange(1, length)
        if not trained.size or trained[-1] >= min(longest, seq_len):
            continue
        gaps = np.flatnonzero(np.diff(trained) > 1)
        start = int(trained[gaps[-1] + 1 if gaps.size else 0])
        ids = dataset.read(document, 0, length).tolist()
        if start:
            questions.append(Question(ids[:start], ids[start : int(trained[-1]) + 1]))
    return questions


class AnswerEvaluator:
    """Asks the same questions of each source whenever it is asked to."""

    def __init__(
        self, datasets: Mapping[str, TokenDataset], tokenizer: Tokenizer, num_questions: int, max_new_tokens: int
    ) -> None:
        """Ask `num_questions` of each source; an answer ends with its turn or after `max_new_tokens`."""
        self._datasets, self._tokenizer = datasets, tokenizer
        self._num_questions, self._max_new_tokens = num_questions, max_new_tokens

    def evaluate(self, model: ShardedModel) -> tuple[dict[str, float], list[Answer]]:
        """Return `validation_exact_answers/<source>` and the answers. Collective: all ranks of the world."""
        values: dict[str, float] = {}
        answers: list[Answer] = []
        for name, dataset in self._datasets.items():
            context = model.config.model.max_position_embeddings
            questions = read_questions(dataset, self._num_questions, context, model.config.train.seq_len)
            if not questions:
                continue
            found = self._ask(model, name, questions)
            values[EXACT_ANSWERS + name] = sum(answer.is_exact for answer in found) / len(found)
            answers += found
        return values, answers

    def _ask(self, model: ShardedModel, name: str, questions: Sequence[Question]) -> list[Answer]:
        ends = tuple({question.answer_ids[-1] for question in questions})
        sampling = Sampling(self._max_new_tokens, temperature=0.0, stop_tokens=ends)
        completions = EngineGenerator(model).generate([question.prompt_ids for question in questions], sampling)
        spell = self._tokenizer.backend.decode
        return [
            Answer(
                name,
                spell(question.prompt_ids, skip_special_tokens=False),
                spell(one.token_ids, skip_special_tokens=False),
                spell(question.answer_ids, skip_special_tokens=False),
                one.token_ids == question.answer_ids,
            )
            for question, one in zip(questions, completions, strict=True)
        ]
