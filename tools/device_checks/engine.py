"""Configs, made-up batches and steps of the device checks, on an engine of one rank (`tools.one_rank`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from configs.stages import Config

if TYPE_CHECKING:
    from trainer.engine.engine import Engine
    from trainer.engine.state import StepResult
    from trainer.stages.base import Stage

SMALL_MODEL: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 128,
    "ffn_hidden_size": 352,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "vocab_size": 500,
}


def build_config(compute: str, model: Mapping[str, Any] = SMALL_MODEL, **sections: Mapping[str, Any]) -> Config:
    """Return a run's config on one rank; the sections given change or add fields."""
    fields: dict[str, dict[str, Any]] = {
        "model": dict(model),
        "train": {"num_steps": 20, "seq_len": 64, "global_batch_size": 4, "micro_batch_size": 2},
        "precision": {"compute": compute},
        "optimizer": {"lr": 3e-3, "min_lr": 3e-4},
        "schedule": {"kind": "constant"},
        "data": {"train": [{"path": "made-up"}]},
    }
    for name, section in sections.items():
        fields[name] = fields.get(name, {}) | dict(section)
    return Config.model_validate(fields)


def build_repeating_stage(engine: Engine) -> Stage:
    """Return pretraining that reads one made-up global batch again and again, so that the loss must fall."""
    from trainer.evaluate.validation import Evaluator
    from trainer.stages.next_token import NextTokenObjective
    from trainer.stages.training import TrainingStage

    reader = RepeatingReader(made_up_batches(engine.config))
    return TrainingStage("pretrain", engine, reader, NextTokenObjective(), Evaluator({}))


class RepeatingReader:
    """Hands out the same batches at every step."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self._batches = batches

    def check(self) -> None:
        """Have nothing that could be wrong."""

    def read_step(self) -> Sequence[Any]:
        """Return the batches."""
        return self._batches

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: every step reads the same."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Need nothing."""

    def close(self) -> None:
        """Have nothing to end."""


def train(stage: Stage, num_steps: int) -> list[StepResult]:
    """Take `num_steps` steps and return what each did."""
    from trainer.engine.state import TrainState

    state, results = TrainState(), []
    for _ in range(num_steps):
        result = stage.step(state)
        state = state.after(result)
        results.append(result)
    return results


def made_up_batches(config: Config) -> list[Any]:
    """Return one global batch of random tokens, as one rank's microbatches."""
    import numpy as np

    from trainer.data.batch import build_batch

    train, random = config.train, np.random.default_rng(5)
    windows = random.integers(0, config.model.vocab_size, (train.global_batch_size, train.seq_len + 1))
    rows = train.micro_batch_size
    return [
        build_batch(windows[first : first + rows], tuple(range(first, first + rows)))
        for first in range(0, train.global_batch_size, rows)
    ]
