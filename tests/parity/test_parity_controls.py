"""The parity tests can fail: deliberately wrong runs, each a bug that trainers have had, must not pass them."""

from __future__ import annotations

from typing import Any

import pytest

from configs.stages import Config
from tests.parity.conftest import assert_equal_runs
from tests.pool import Place
from tests.small_runs import RunRecord, build_stage, open_engine, record_run, run_from_seed, train_steps


def run_with_a_fault(place: Place, config: Config, run_dir: str, masks: str, fault: Any) -> RunRecord:
    """Run from the seed checkpoint after `fault(engine, stage)` has put a bug in."""
    from trainer.checkpoint.layout import resolve_checkpoint
    from trainer.checkpoint.load import warm_start
    from trainer.engine.state import TrainState

    with open_engine(place, config) as engine:
        warm_start(engine, resolve_checkpoint(run_dir))
        stage = build_stage(engine, masks)
        fault(engine, stage)
        _, results = train_steps(stage, TrainState(), config.train.num_steps)
        return record_run(engine, results)


def lose_norm_gradients(place: Place, config: Config, run_dir: str, masks: str) -> RunRecord:
    """Leave out the sum over tp of the norms' gradients that sequence parallelism needs."""

    def fault(engine: Any, stage: Any) -> None:
        for chunk in engine.chunks:
            for parameter in chunk.parameters():
                parameter.sequence_parallel = False

    return run_with_a_fault(place, config, run_dir, masks, fault)


def average_averages(place: Place, config: Config, run_dir: str, masks: str) -> RunRecord:
    """Give each microbatch, not each token, the same weight."""
    from trainer.losses.loss import Loss

    def fault(engine: Any, stage: Any) -> None:
        plain = stage.objective.loss

        def loss(output: Any, batch: Any) -> Loss:
            summed = plain(output, batch)
            return Loss(summed.total / stage.objective.count(batch).clamp(min=1) * 37)

        stage.objective.loss = loss

    return run_with_a_fault(place, config, run_dir, masks, fault)


def read_the_same_data(place: Place, config: Config, run_dir: str, masks: str) -> RunRecord:
    """Let every data-parallel rank read rank 0's samples."""

    def fault(engine: Any, stage: Any) -> None:
        stage.reader._dp_rank = 0

    return run_with_a_fault(place, config, run_dir, masks, fault)


def swap_key_heads(place: Place, config: Config, run_dir: str, masks: str) -> RunRecord:
    """Exchange the tp ranks' shards of the first attention layer's output projection."""
    import torch.distributed as dist

    def fault(engine: Any, stage: Any) -> None:
        weight = engine.chunks[0].decoder.layers[0].self_attention.linear_proj.weight
        shards = [weight.data.clone() for _ in range(2)]
        dist.all_gather(shards, weight.data.clone(), group=engine.mesh.tp_group)
        weight.data.copy_(shards[1 - engine.mesh.tp_rank])
        engine.optimizer.reload_model_params()

    return run_with_a_fault(place, config, run_dir, masks, fault)


def forget_documents(place: Place, config: Config, run_dir: str, masks: str) -> RunRecord:
    """Attend across document boundaries, with the right loss mask and positions."""
    from dataclasses import replace

    def fault(engine: Any, stage: Any) -> None:
        plain = stage.reader.read_step
        stage.reader.read_step = lambda: [replace(batch, documents=None) for batch in plain()]

    return run_with_a_fault(place, config, run_dir, masks, fault)


FAULTS = {
    "lost_norm_gradients": (lose_norm_gradients, 2, {"tp": 2, "sp": True}, "all"),
    "average_of_averages": (average_averages, 2, {}, "uneven"),
    "same_data_on_all_replicas": (read_the_same_data, 2, {}, "all"),
    "swapped_heads": (swap_key_heads, 2, {"tp": 2}, "all"),
    "forgotten_documents": (forget_documents, 1, {}, "documents"),
    "forgotten_mask": (run_from_seed, 1, {}, "all"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_does_not_pass(judge, name):
    case, world, parallel, masks = FAULTS[name]
    run = judge.run(world, parallel, masks, case)
    right = judge.reference("uneven" if name == "forgotten_mask" else masks)
    with pytest.raises(AssertionError):
        assert_equal_runs(run, right)


def test_a_fault_shows_in_the_gradient_norm_at_the_first_step(judge):
    """The loss of step 1 is right in spite of this bug: only norms and later steps can tell."""
    run = judge.run(2, {"tp": 2, "sp": True}, "all", lose_norm_gradients)
    right = judge.reference()
    assert run.losses[0] == pytest.approx(right.losses[0], rel=1e-5)
    assert abs(run.grad_norms[0] / right.grad_norms[0] - 1) > 1e-4
