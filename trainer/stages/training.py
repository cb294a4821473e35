"""The stage of one model that learns from a reader's batches by one objective: pretraining and all that is like it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from parallel.watch.phases import phase
from trainer.data.batch import Batch
from trainer.engine.build import POLICY
from trainer.engine.engine import Engine
from trainer.engine.objective import Objective
from trainer.engine.parts import Checkpointed
from trainer.engine.sharded_state import RandomGenerators
from trainer.engine.state import StepResult, TrainState
from trainer.evaluate.validation import Evaluation, Evaluator
from trainer.optim.learning_rate import compute_learning_rate


class StepReader(Protocol):
    """Where the batches come from, in order (`trainer.data.reader.BatchReader`)."""

    def check(self) -> None:
        """Raise BadInput where the next step cannot be read or does not fit the model."""
        ...

    def read_step(self) -> Sequence[Batch]:
        """Return this rank's microbatches of the next step."""
        ...

    def state_dict(self) -> Mapping[str, Any]:
        """Return the cursor, the same on every rank."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a cursor."""
        ...

    def close(self) -> None:
        """End what reads ahead."""
        ...


class TrainingStage:
    """One update a step, on the next global batch."""

    def __init__(
        self,
        name: str,
        engine: Engine,
        reader: StepReader | None,
        objective: Objective,
        evaluator: Evaluator,
        evaluated: Objective | None = None,
        prepare: Callable[[Engine, Sequence[Batch]], list[Batch]] | None = None,
    ) -> None:
        """Read from `reader`; None serves a run of no steps, which writes a seed checkpoint.

        Validation measures `evaluated`, or what is trained. `prepare` adds to the microbatches of a step what the model
        says of all of them, and is collective.
        """
        self.name = name
        self.objective = objective
        self._evaluated = evaluated or objective
        self.parts: Mapping[str, Checkpointed] = {POLICY: engine, "rng": RandomGenerators(engine.mesh)}
        self._engine = engine
        self.reader = reader
        self._evaluator = evaluator
        self._prepare = prepare

    def start(self, state: TrainState) -> None:
        """Read the first step and the validation samples ahead. Raises BadInput where they do not fit the model."""
        if self.reader is not None:
            self.reader.check()
        self._evaluator.check()

    def step(self, state: TrainState) -> StepResult:
        """Train on the next global batch. Collective: all ranks of the world must call this."""
        assert self.reader is not None  # the config check asks for data where there are steps
        started = time.perf_counter()
        with phase("data"):
            batches = self.reader.read_step()
        return self._learn(batches, state, {"data": time.perf_counter() - started})

    def _learn(
        self,
        batches: Sequence[Batch],
        state: TrainState,
        seconds: Mapping[str, float],
        objective: Objective | None = None,
    ) -> StepResult:
        """Update by a global batch, by the stage's objective unless another is given. Collective: all ranks.

        `seconds` are what it took to come by the batch, by phase.
        """
        phases = dict(seconds)
        if self._prepare is not None:
            started = time.perf_counter()
            with phase("score"):
                batches = self._prepare(self._engine, batches)
            phases["score"] = time.perf_counter() - started
        config = self._engine.config
        rate = compute_learning_rate(state.step, config.train.num_steps, config.optimizer, config.schedule)
        result = self._engine.train_step(batches, objective or self.objective, rate)
        return dataclasses.replace(result, phase_seconds={**phases, **result.phase_seconds})

    def evaluate(self) -> Evaluation:
        """Return the validation losses. Collective: all ranks of the world must call this."""
        return self._evaluator.evaluate(self._engine, self._evaluated)

    def describe_fault(self) -> str:
        """Return what made the last step non-finite. Collective: all ranks of the world must call this."""
        return self._engine.describe_fault()

    def state_dict(self) -> Mapping[str, Any]:
        """Return the data cursor."""
        return {"data": self.reader.state_dict() if self.reader is not None else None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the data cursor."""
        if self.reader is not None and state["data"] is not None:
            self.reader.load_state_dict(state["data"])

    def close(self) -> None:
        """End the reader's thread."""
        if self.reader is not None:
            self.reader.close()
