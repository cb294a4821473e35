"""A world of one rank on a platform, and engines of any config on it with made-up batches: what checks run on."""

from __future__ import annotations

import contextlib
import gc
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.schema import Config
from parallel.platform import PlatformName

if TYPE_CHECKING:
    from parallel.mesh import Mesh
    from trainer.engine import Engine
    from trainer.stages.base import Stage
    from trainer.state import StepResult

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


@contextlib.contextmanager
def open_world(platform_name: PlatformName) -> Iterator[Mesh]:
    """Start a world of one rank with the platform's collectives and yield its mesh; it ends with the context."""
    import torch.distributed as dist

    from parallel.mesh import build_mesh, destroy_mesh, init_world
    from parallel.platform import load_platform

    platform = load_platform(platform_name)
    device = platform.activate(0)
    config = build_config("fp32")
    with tempfile.TemporaryDirectory(prefix="world-") as folder:
        meeting = (Path(folder) / "store").as_uri()
        init_world(platform, config, rank=0, world_size=1, init_method=meeting)
        try:
            yield build_mesh(platform, device, config)
        finally:
            destroy_mesh()
            dist.destroy_process_group()


@contextlib.contextmanager
def open_engine(config: Config, mesh: Mesh) -> Iterator[Engine]:
    """Yield an engine with new weights, built as `trainer.run` builds it; its memory is free after the context."""
    from trainer.run import build_engine

    engine = build_engine(config, mesh)
    try:
        yield engine
    finally:
        engine.close()
        del engine
        gc.collect()


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
    from trainer.state import TrainState

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
