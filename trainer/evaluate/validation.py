"""Validation: the mean loss of each source on its own, on fixed samples, the same on every layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import batched
from operator import add

from trainer.data.batch import Batch, without_loss
from trainer.data.reader import ValidationReader
from trainer.engine.engine import Engine
from trainer.engine.objective import Objective
from trainer.engine.sums import BatchSums
from trainer.evaluate.answers import AnswerEvaluator, Spoken

VALIDATION_LOSS = "validation_loss/"
VALIDATION_PERPLEXITY = "validation_perplexity/"
VALIDATION_SCORE = "validation_score/"


@dataclass(frozen=True)
class Evaluation:
    """What a validation has found."""

    values: dict[str, float]
    """By the name it is logged under."""
    answers: Sequence[Spoken] = ()
    """To questions of the validation sources, where any are asked."""


class Evaluator:
    """Evaluates every validation source when asked."""

    def __init__(
        self,
        readers: Mapping[str, ValidationReader],
        answers: AnswerEvaluator | None = None,
        *,
        prepare: Callable[[Engine, Sequence[Batch]], list[Batch]] | None = None,
        has_perplexity: bool = True,
        at_once: int | None = None,
    ) -> None:
        """`prepare` adds to a source's microbatches what the model says of all of them, and is collective.

        With `at_once` it does so with so many at a time, as what it adds is large. Without `has_perplexity` the loss is
        none of tokens.
        """
        self._readers = readers
        self._answers = answers
        self._prepare, self._has_perplexity, self._at_once = prepare, has_perplexity, at_once

    def check(self) -> None:
        """Raise BadInput where a source cannot be read or does not fit the model."""
        for reader in self._readers.values():
            reader.check()

    def evaluate(self, engine: Engine, objective: Objective) -> Evaluation:
        """Return `validation_loss/<source>` in nats and `validation_perplexity/<source>` for each source.

        What else the objective takes means of is `validation_<name>/<source>`.
        Collective: all ranks of the world must call this.
        """
        values: dict[str, float] = {}
        for name, reader in self._readers.items():
            batches = fill_pipeline(list(reader.batches()), engine.mesh.pp_size if engine.mesh.vpp_size > 1 else 1)
            sums = self._sum(engine, batches, objective)
            loss = values[VALIDATION_LOSS + name] = sums.mean
            if self._has_perplexity:
                values[VALIDATION_PERPLEXITY + name] = math.exp(min(loss, 700.0))
            values |= {f"validation_{figure}/{name}": value for figure, value in sums.means.items()}
        if self._answers is None:
            return Evaluation(values)
        exact, answers = self._answers.evaluate(engine)
        return Evaluation(values | exact, answers)

    def _sum(self, engine: Engine, batches: list[Batch], objective: Objective) -> BatchSums:
        """Return the sums of a source. Collective: all ranks of the world must call this."""
        if self._prepare is None:
            return engine.sum_losses(batches, objective)
        at_once = len(batches) if self._at_once is None else self._at_once * engine.mesh.pp_size
        parts = [engine.sum_losses(self._prepare(engine, list(some)), objective) for some in batched(batches, at_once)]
        return reduce(add, parts)


def fill_pipeline(batches: list[Batch], multiple: int) -> list[Batch]:
    """Return the batches with copies that count for nothing, up to a multiple: the interleaved schedule wants one."""
    missing = -len(batches) % multiple
    return batches + [without_loss(batches[-1], 0)] * missing
