"""The protocol of a training stage: it owns its step. Knows nothing of files, logs or what happens around a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from configs.stages import Config
from parallel.mesh import Mesh
from trainer.data.corpus import Corpus
from trainer.engine.parts import Checkpointed
from trainer.engine.sharded_model import ShardedModel
from trainer.engine.state import StepResult, TrainState
from trainer.evaluate.validation import Evaluation


class Stage(Protocol):
    """What the loop, the hooks and the checkpoints ask of a stage. `step`, `evaluate` and `describe_fault` are
    collective: all ranks of the world must call them."""

    name: str
    parts: Mapping[str, Checkpointed]
    """What checkpoints hold in shards, by name; `policy` is the model that the run is about."""

    def start(self, state: TrainState) -> None:
        """Prepare for the step that follows `state`, before anything is written; raise BadInput for what cannot be."""
        ...

    def step(self, state: TrainState) -> StepResult:
        """Take the step that follows `state`: one line of the log, whatever it consists of."""
        ...

    def evaluate(self) -> Evaluation:
        """Return what validation measures."""
        ...

    def describe_fault(self) -> str:
        """Return which ranks and data made the last step non-finite."""
        ...

    def state_dict(self) -> Mapping[str, Any]:
        """Return what a checkpoint must keep beside `parts`, as plain data that is the same on every rank."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned, on any layout."""
        ...

    def close(self) -> None:
        """End what runs in the background."""
        ...


@dataclass(frozen=True)
class StageContext:
    """What a stage is built from."""

    config: Config
    mesh: Mesh
    models: Mapping[str, ShardedModel]
    """By role: the policy, and those of `config.second_models`, with their weights by the time of `Stage.start`. One
    that is trained is an `Engine`, goes into `Stage.parts` under its role, and its `config` has its own optimizer."""
    corpus: Corpus


BuildStage = Callable[[StageContext], Stage]
"""How a stage comes into being. Raises BadInput for what cannot be."""
