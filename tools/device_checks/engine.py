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


def build_repeating_stage(config: Config) -> Stage:
    """Return a pretraining stage that reads one made-up global batch again and again, so that the loss must fall."""
    from trainer.stages.pretrain import PretrainStage

    batches = _made_up_batches(config)

    class RepeatingStage(PretrainStage):
        """Pretraining on one global batch."""

        def batches_for(self, state: Any) -> Sequence[Any]:
            return batches

    return RepeatingStage(None)


def train(engine: Engine, stage: Stage, num_steps: int) -> list[StepResult]:
    """Take `num_steps` steps and return what each did."""
    from trainer.engine.state import TrainState

    state, results = TrainState(), []
    for _ in range(num_steps):
        result = engine.train_step(stage.batches_for(state), stage, state)
        state = state.after(result)
        results.append(result)
    return results


def _made_up_batches(config: Config) -> list[Any]:
    import numpy as np

    from trainer.data.batch import build_batch

    train, random = config.train, np.random.default_rng(5)
    windows = random.integers(0, config.model.vocab_size, (train.global_batch_size, train.seq_len + 1))
    rows = train.micro_batch_size
    return [
        build_batch(windows[first : first + rows], tuple(range(first, first + rows)))
        for first in range(0, train.global_batch_size, rows)
    ]
