"""A save under way that nobody waits for, as when an error ends a run in a process that goes on to another."""

from __future__ import annotations

from pathlib import Path

from tests.pool import Place
from tests.small_runs import build_stage, open_engine, save_checkpoint, small_config


def abandon_a_save(place: Place, run_dir: str) -> None:
    """Let a save be written and never finish it."""
    from trainer.checkpoint.save import CheckpointWriter
    from trainer.engine.state import TrainState

    with open_engine(place, small_config(checkpoint={"async_save": True})) as engine:
        writer = CheckpointWriter(run_dir, engine.config, engine.mesh)
        writer.save(TrainState(), build_stage(engine))
        while writer.is_writing:
            pass


def save_and_load(place: Place, run_dir: str) -> list[str]:
    """Save another, smaller model, load it, and return the names of the weights that differ."""
    import torch

    from trainer.checkpoint.layout import resolve_checkpoint
    from trainer.checkpoint.load import warm_start
    from trainer.engine.state import TrainState

    with open_engine(place, small_config(model={"hidden_size": 32, "num_layers": 2})) as engine:
        save_checkpoint(engine, TrainState(), build_stage(engine), Path(run_dir))
        saved = {name: weight.detach().clone() for name, weight in engine.chunks[0].named_parameters()}
        for weight in engine.chunks[0].parameters():
            weight.data.zero_()
        warm_start(engine, resolve_checkpoint(run_dir))
        return [name for name, weight in engine.chunks[0].named_parameters() if not torch.equal(weight, saved[name])]


def test_abandoned_saves_leave_nothing_to_the_next(ranks, tmp_path):
    for _ in range(2):
        ranks.run(abandon_a_save, str(tmp_path / "abandoned"))
    assert ranks.run(save_and_load, str(tmp_path / "next")) == [[]]
