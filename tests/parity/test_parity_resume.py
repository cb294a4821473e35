"""A run stopped at step 3 and resumed is the uninterrupted one: bit for bit on its layout, within 1e-5 on others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from configs.plan.derive import padded_vocab_size
from configs.stages import Config
from tests.parity.conftest import assert_equal_runs
from tests.pool import Place
from tests.small_runs import (
    RunRecord,
    build_stage,
    open_engine,
    record_run,
    roughen,
    save_checkpoint,
    small_config,
    train_steps,
)

STOP = 3
LAYOUTS = {
    "one": (1, {}),
    "tp2_sp": (2, {"tp": 2, "sp": True}),
    "pp2": (2, {"pp": 2}),
    "dp2": (2, {}),
    "tp2_pp2": (4, {"tp": 2, "pp": 2}),
    "pp2_vpp2_dp2": (4, {"pp": 2, "vpp": 2}),
    "cp2": (2, {"cp": 2}),
    "cp2_ulysses": (2, {"cp": 2, "cp_attention": "ulysses"}),
    "ep2": (2, {"ep": 2}),
    "ep4": (4, {"ep": 4}),
    "ep2_tp2": (4, {"ep": 2, "tp": 2, "sp": True}),
}
EXPERTS = {
    "moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 64, "score_function": "sigmoid", "balancing": "bias"}
}


def run_and_save(place: Place, config: Config, run_dir: str) -> RunRecord:
    """Train to the end, saving at STOP on the way; return the record of the steps after it."""
    from trainer.engine.state import TrainState

    with open_engine(place, config) as engine:
        if place.world_size == 1 and not config.model.hidden_dropout:
            roughen(engine)
        stage = build_stage(engine, "uneven")
        state, _ = train_steps(stage, TrainState(), STOP)
        save_checkpoint(engine, state, stage, Path(run_dir))
        _, results = train_steps(stage, state, config.train.num_steps - STOP)
        return record_run(engine, results)


def resume_run(place: Place, config: Config, run_dir: str) -> RunRecord:
    """Train from the checkpoint to the end."""
    from trainer.checkpoint.layout import resolve_checkpoint
    from trainer.checkpoint.load import resume

    with open_engine(place, config) as engine:
        stage = build_stage(engine, "uneven")
        state = resume(engine.config, engine.mesh, stage, resolve_checkpoint(run_dir))
        assert state.step == STOP and state.consumed_samples == STOP * config.train.global_batch_size
        _, results = train_steps(stage, state, config.train.num_steps - STOP)
        return record_run(engine, results)


def make_config(name: str, model: dict | None = None) -> tuple[int, Config]:
    world, parallel = LAYOUTS[name]
    return world, small_config(world, parallel=parallel, model=model or {})


@pytest.fixture(scope="module")
def stopped_run(ranks, tmp_path_factory):
    """Return a function that gives the run directory and record of a run stopped on a layout, made once."""
    made = {}

    def get(name, model=None):
        key = (name, str(model))
        if key not in made:
            run_dir = tmp_path_factory.mktemp("stopped")
            world, config = make_config(name, model)
            made[key] = run_dir, ranks.run(run_and_save, config, str(run_dir), world=world)[0]
        return made[key]

    return get


@pytest.mark.parametrize("name", ["one", "tp2_pp2", pytest.param("pp2_vpp2_dp2")])
def test_same_layout_bit_for_bit(ranks, stopped_run, name):
    """With dropout, so that the random generators must continue too."""
    model = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
    run_dir, uninterrupted = stopped_run(name, model)
    world, config = make_config(name, model)
    resumed = ranks.run(resume_run, config, str(run_dir), world=world)[0]
    assert resumed.losses == uninterrupted.losses
    assert resumed.grad_norms == uninterrupted.grad_norms
    assert np.array_equal(resumed.logits, uninterrupted.logits)


@pytest.mark.parametrize(
    "before, after",
    [("one", "tp2_pp2"), ("tp2_pp2", "dp2"), pytest.param("dp2", "pp2_vpp2_dp2")]
    + [pytest.param("pp2_vpp2_dp2", after) for after in ("one", "tp2_sp", "pp2")]
    + [("one", "cp2"), ("cp2", "one"), ("cp2", "cp2_ulysses")],
)
def test_another_layout(ranks, stopped_run, before, after):
    run_dir, uninterrupted = stopped_run(before)
    world, config = make_config(after)
    resumed = ranks.run(resume_run, config, str(run_dir), world=world)[0]
    assert_equal_runs(resumed, uninterrupted)


@pytest.mark.parametrize("before, after", [("one", "tp2_sp"), ("tp2_pp2", "one")])
def test_sinks_on_another_layout(ranks, stopped_run, before, after):
    model = {"attention_sinks": True}
    run_dir, uninterrupted = stopped_run(before, model)
    world, config = make_config(after, model)
    resumed = ranks.run(resume_run, config, str(run_dir), world=world)[0]
    assert_equal_runs(resumed, uninterrupted)


@pytest.mark.parametrize("before, after", [("one", "ep2"), ("one", "ep2_tp2"), ("ep2", "one"), ("ep2_tp2", "ep4")])
def test_experts_on_another_layout(ranks, stopped_run, before, after):
    """Experts share the optimizer with the rest on one rank and have one of their own under expert parallelism."""
    run_dir, uninterrupted = stopped_run(before, EXPERTS)
    world, config = make_config(after, EXPERTS)
    resumed = ranks.run(resume_run, config, str(run_dir), world=world)[0]
    assert_equal_runs(resumed, uninterrupted)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "before, rows_before, after, rows_after",
    [("one", 250, "tp2_sp", 256), ("one", 250, "tp2_pp2", 384), ("tp2_pp2", 384, "one", 250), ("dp2", 256, "pp2", 250)],
)
def test_another_padding_of_the_vocabulary(ranks, stopped_run, before, rows_before, after, rows_after, tied):
    """Padding is layout: embedding, output layer and the moments of both move between vocabularies of other sizes."""
    multiples = {250: 1, 256: 16, 384: 192}
    model = {"vocab_pad_multiple": multiples[rows_before], "tie_embeddings": tied}
    run_dir, uninterrupted = stopped_run(before, model)
    world, config = make_config(after, model | {"vocab_pad_multiple": multiples[rows_after]})
    assert padded_vocab_size(config.model) == rows_after
    resumed = ranks.run(resume_run, config, str(run_dir), world=world)[0]
    assert_equal_runs(resumed, uninterrupted)


def test_a_warm_start_takes_another_padding_of_the_vocabulary(ranks, stopped_run):
    run_dir, _ = stopped_run("one", {"vocab_pad_multiple": 1, "tie_embeddings": False})
    runs = [
        ranks.run(warm_start_run, make_config(name, {"vocab_pad_multiple": multiple})[1], str(run_dir), world=world)[0]
        for name, world, multiple in (("one", 1, 1), ("tp2_sp", 2, 128))
    ]
    assert_equal_runs(runs[1], runs[0])


def test_changed_optimizer_settings_apply_on_resume(ranks, stopped_run):
    """The learning rate and weight decay of the new config hold, not those that were saved."""
    run_dir, uninterrupted = stopped_run("one")
    config = small_config(optimizer={"lr": 1e-4, "min_lr": 1e-5, "weight_decay": 0.0})
    changed = ranks.run(resume_run, config, str(run_dir))[0]
    assert changed.losses[0] == uninterrupted.losses[0]
    assert changed.losses[1] != uninterrupted.losses[1]


def test_resuming_without_the_optimizer_would_show(ranks, stopped_run, tmp_path):
    """A warm start from the same checkpoint, which forgets the moments, must not pass for a resumed run."""
    run_dir, uninterrupted = stopped_run("one")
    world, config = make_config("one")
    warm = ranks.run(warm_start_run, config, str(run_dir), world=world)[0]
    assert warm.losses[0] == uninterrupted.losses[0]
    with pytest.raises(AssertionError):
        assert_equal_runs(warm, uninterrupted)


def warm_start_run(place: Place, config: Config, run_dir: str) -> RunRecord:
    """Train on from the weights alone, on the same data."""
    from trainer.checkpoint.layout import resolve_checkpoint
    from trainer.checkpoint.load import warm_start
    from trainer.engine.state import TrainState

    with open_engine(place, config) as engine:
        warm_start(engine, resolve_checkpoint(run_dir))
        stage = build_stage(engine, "uneven")
        stage.load_state_dict({"data": {"step": STOP}})
        _, results = train_steps(stage, TrainState(step=STOP), config.train.num_steps - STOP)
        return record_run(engine, results)
