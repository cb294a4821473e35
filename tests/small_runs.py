"""A small model and made-up data on any layout: what parity tests and engine tests run in the pool.

Imported by the tests and by the workers; torch and Megatron-Core only inside functions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from configs.rules.check import check_config
from configs.stages import Config
from tests.pool import Place

if TYPE_CHECKING:
    from parallel.mesh import Mesh
    from trainer.engine.engine import Engine
    from trainer.engine.state import StepResult

VOCAB_SIZE = 250
DOCUMENT_END_ID = 5
SEQ_LEN = 32
GLOBAL_BATCH_SIZE = 8
# Pads 250 ids to 256; init_std is large so that attention and logits are far from uniform.
DENSE_MODEL: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "vocab_size": VOCAB_SIZE,
    "vocab_pad_multiple": 16,
    "max_position_embeddings": 128,
    "init_std": 0.06,
}


def small_config(world: int = 1, **sections: Mapping[str, Any]) -> Config:
    """Return a valid config of the small dense model; the sections given change or add fields."""
    fields: dict[str, dict[str, Any]] = {
        "model": dict(DENSE_MODEL),
        "train": {
            "num_steps": 5,
            "seq_len": SEQ_LEN,
            "global_batch_size": GLOBAL_BATCH_SIZE,
            "micro_batch_size": 2,
        },
        # Adam divides by the gradient's size: with the usual eps, rounding in a gradient near zero becomes a full step.
        "optimizer": {"lr": 3e-3, "min_lr": 3e-4, "eps": 1e-6},
        "precision": {"compute": "fp32"},
        "parallel": {"timeout_seconds": 60},
        "data": {"train": [{"path": "made-up"}]},
        "checkpoint": {"async_save": False},
    }
    for name, section in sections.items():
        fields[name] = section if section is None else (fields.get(name) or {}) | dict(section)
    config = Config.model_validate(fields)
    problems = check_config(config, world, platform="cpu", has_te=False)
    assert not problems, problems
    return config


class MadeUpReader:
    """Random tokens by step and sample, dealt to dp ranks as the real reader deals them, with a choice of masks.

    `masks`: "all" counts every token; "uneven" counts a different share of each sample, and none of samples 2 and 3,
    which are a whole microbatch (and with dp = 2 a rank's whole share of it); "documents" attends inside documents.
    """

    def __init__(self, config: Config, dp_rank: int, dp_size: int, masks: str = "all") -> None:
        self._config, self._dp_rank, self._dp_size, self._masks = config, dp_rank, dp_size, masks
        self._step = 0

    def read_step(self) -> list[Any]:
        """Return this rank's microbatches of the next step."""
        import torch

        from trainer.data.batch import build_batch

        train, rows = self._config.train, self._config.train.micro_batch_size
        random = np.random.default_rng([7, self._step])
        self._step += 1
        windows = random.integers(0, VOCAB_SIZE, (train.global_batch_size, train.seq_len + 1))
        shares = random.uniform(0.05, 1.0, train.global_batch_size)
        shares[2:4] = 0.0
        counted = random.uniform(size=windows[:, 1:].shape) < shares[:, None]
        if self._masks == "documents":
            windows[random.uniform(size=windows.shape) < 0.06] = DOCUMENT_END_ID
        batches = []
        for first in range(self._dp_rank * rows, train.global_batch_size, rows * self._dp_size):
            mine = slice(first, first + rows)
            ends = DOCUMENT_END_ID if self._masks == "documents" else None
            batch = build_batch(windows[mine], tuple(range(first, first + rows)), ends)
            if self._masks == "uneven":
                batch.loss_mask.copy_(torch.from_numpy(counted[mine]))
            batches.append(batch)
        return batches

    def state_dict(self) -> dict[str, int]:
        """Return the next step."""
        return {"step": self._step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue at the next step."""
        self._step = state["step"]


@contextlib.contextmanager
def open_mesh(place: Place, config: Config) -> Iterator[Mesh]:
    """Join the ranks and yield their mesh; the pool forgets the ranks afterwards."""
    from parallel.mesh import build_mesh, init_world
    from parallel.platform import load_platform

    platform = load_platform("cpu")
    device = platform.activate(0)
    init_world(platform, config, rank=place.rank, world_size=place.world_size, init_method=place.init_method)
    yield build_mesh(platform, device, config)


@contextlib.contextmanager
def open_engine(place: Place, config: Config) -> Iterator[Engine]:
    """Join the ranks and yield the engine of the config on them."""
    from trainer.engine.build import build_engine

    with open_mesh(place, config) as mesh:
        engine = build_engine(config, mesh)
        try:
            yield engine
        finally:
            engine.close()


def build_stage(engine: Engine, masks: str = "all") -> Any:
    """Return the pretraining stage on made-up data."""
    from trainer.evaluate.validation import Evaluator
    from trainer.stages.next_token import NextTokenObjective
    from trainer.stages.training import TrainingStage

    reader: Any = MadeUpReader(engine.config, engine.mesh.dp_rank, engine.mesh.dp_size, masks)
    return TrainingStage("pretrain", engine, reader, NextTokenObjective(), Evaluator({}))


def save_checkpoint(engine: Engine, state: Any, stage: Any, run_dir: Path) -> None:
    """Write a checkpoint as `trainer.run` does, at once."""
    from trainer.checkpoint.save import CheckpointWriter

    writer = CheckpointWriter(run_dir, engine.config, engine.mesh)
    writer.save(state, stage)
    writer.finish()


def roughen(engine: Engine) -> None:
    """Move norm weights, biases and router biases off their constants, so that a wrong gradient of theirs shows."""
    import torch

    generator = torch.Generator().manual_seed(3)
    for chunk in engine.chunks:
        for parameter in chunk.parameters():
            if parameter.dim() == 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data.add_(noise.to(parameter.device, parameter.dtype), alpha=0.1)
    engine.optimizer.reload_model_params()


@dataclass(frozen=True)
class RunRecord:
    """What a run did, comparable between layouts."""

    losses: list[float]
    grad_norms: list[float]
    num_tokens: list[int]
    logits: np.ndarray
    """Of the trained weights on a fixed text, `[batch, seq, vocab]`."""


def record_run(engine: Engine, results: list[StepResult]) -> RunRecord:
    """Return the record of the steps done. Collective: all ranks of the world must call this."""
    import torch

    engine.finish_parameter_gather()
    text = torch.from_numpy(np.random.default_rng(11).integers(0, VOCAB_SIZE, (2, 15)))
    return RunRecord(
        losses=[result.loss for result in results],
        grad_norms=[result.grad_norm for result in results],
        num_tokens=[result.num_tokens for result in results],
        logits=engine.compute_logits(text).numpy(),
    )


def train_steps(stage: Any, state: Any, num_steps: int) -> tuple[Any, list[StepResult]]:
    """Take steps as `fit` does and return the state and the results."""
    results = []
    for _ in range(num_steps):
        result = stage.step(state)
        state = state.after(result)
        results.append(result)
    return state, results


def write_seed_checkpoint(place: Place, config: Config, run_dir: str) -> None:
    """Write the checkpoint that all layouts begin from: random weights, nothing at a constant."""
    from trainer.engine.state import TrainState

    with open_engine(place, config) as engine:
        roughen(engine)
        save_checkpoint(engine, TrainState(), build_stage(engine), Path(run_dir))


def run_from_seed(place: Place, config: Config, run_dir: str, masks: str = "all") -> RunRecord:
    """Warm-start from a run directory's checkpoint, train `train.num_steps` steps, and return the record."""
    from trainer.checkpoint.layout import resolve_checkpoint
    from trainer.checkpoint.load import warm_start
    from trainer.engine.state import TrainState

    with open_engine(place, config) as engine:
        warm_start(engine, resolve_checkpoint(run_dir))
        stage = build_stage(engine, masks)
        _, results = train_steps(stage, TrainState(), config.train.num_steps)
        return record_run(engine, results)
