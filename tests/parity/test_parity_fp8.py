"""FP8 (emulated): every layout scales alike, so it computes the same; a resumed run is the uninterrupted one.

Sums that are rounded otherwise, as each processor's matrix products do, move single numbers across the border between
two FP8 values, by a part in 16: 2.6e-5 of the first step's loss on one processor, nothing on another, more later.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from configs.fp8 import RECIPES
from configs.stages import Config
from tests.pool import Place
from tests.small_runs import build_stage, open_engine, save_checkpoint, small_config, train_steps

# Sizes that tp2 does not cut through a block of 128.
MODEL = {"hidden_size": 256, "ffn_hidden_size": 256, "num_attention_heads": 4, "num_query_groups": 4, "num_layers": 2}
EXPERTS = MODEL | {"moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 256, "shared_expert_ffn_hidden_size": 256}}
FIRST_STEP = 1e-4
LATER_STEPS = 5e-3
# Which tokens meet in one expert's matrix depends on ep; where the whole matrix shares a scale, its smallest numbers,
# which FP8 holds with fewer bits, differ. Routing differs for tokens that two experts suit alike, by rounding too.
OTHER_SCALES = 1e-3
LATER_STEPS_OF_EXPERTS = 2e-2
LAYOUTS = {
    "tp2": (2, {"tp": 2}),
    "tp2_sp": (2, {"tp": 2, "sp": True}),
    "pp2": (2, {"pp": 2}),
    "dp2": (2, {}),
}
# Attention adds up in another order, which moves single numbers across a border in the first step already, and blocks
# along the tokens are cut from other tokens.
EP_LAYOUTS = {"ep2": (2, {"ep": 2}), "ep2_tp2_sp": (4, {"ep": 2, "tp": 2, "sp": True})}
CP_LAYOUTS = {"cp2": (2, {"cp": 2}), "cp2_tp2_sp": (4, {"cp": 2, "tp": 2, "sp": True})}


def check(judge, layout, model, recipe, first=FIRST_STEP, later=LATER_STEPS):
    world, parallel = layout
    sections = {"model": model, "precision": {"fp8": {"recipe": recipe, "backend": "emulated"}}}
    reference, run = judge.reference(**sections), judge.run(world, parallel, **sections)
    assert run.num_tokens == reference.num_tokens
    np.testing.assert_allclose(run.losses[0], reference.losses[0], rtol=first)
    np.testing.assert_allclose(run.grad_norms[0], reference.grad_norms[0], rtol=first)
    np.testing.assert_allclose(run.losses, reference.losses, rtol=later)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_layout_equals_one_rank(judge, recipe, layout):
    check(judge, LAYOUTS[layout], MODEL, recipe)


@pytest.mark.parametrize(("recipe", "layout"), [*((one, "cp2_tp2_sp") for one in RECIPES), ("delayed", "cp2")])
def test_context_parallel_equals_one_rank(judge, recipe, layout):
    check(judge, CP_LAYOUTS[layout], MODEL, recipe, OTHER_SCALES)


def record_scales(place: Place, config: Config, run_dir: str) -> list[tuple[str, str, float]]:
    """Return linear, operand and the value that scales it of the first microbatch, in the order of the passes."""
    from trainer.checkpoint.layout import resolve_checkpoint
    from trainer.checkpoint.load import warm_start
    from trainer.engine.state import TrainState
    from trainer.model.fp8.linear import Fp8Linear

    found, plain = [], Fp8Linear._tensor_amax

    def record(self, role, matrix, *, is_recording):
        amax = plain(self, role, matrix, is_recording=is_recording)
        found.append((f"{self._site}", role, float(amax)))
        return amax

    Fp8Linear._tensor_amax = record
    try:
        with open_engine(place, config) as engine:
            warm_start(engine, resolve_checkpoint(run_dir))
            build_stage(engine).step(TrainState())
    finally:
        Fp8Linear._tensor_amax = plain
    return found


def test_ranks_that_share_a_sequence_scale_alike(judge, ranks):
    """One scale for the tokens of all of them, as one rank has it."""
    train = {"num_steps": 1, "seq_len": 32, "global_batch_size": 2, "micro_batch_size": 2}
    sections = {"model": MODEL, "train": train, "precision": {"fp8": {"recipe": "tensorwise", "backend": "emulated"}}}
    seed = str(judge.seed(MODEL))
    (expected,) = ranks.run(record_scales, small_config(**sections), seed)
    found = ranks.run(record_scales, small_config(2, parallel={"cp": 2}, **sections), seed, world=2)
    assert len(expected) == 24
    for one in found:
        assert [place[:2] for place in one] == [place[:2] for place in expected]
        np.testing.assert_allclose([place[2] for place in one], [place[2] for place in expected], rtol=2e-6)


@pytest.mark.parametrize(("recipe", "layout"), [*((one, "ep2_tp2_sp") for one in RECIPES), ("delayed", "ep2")])
def test_experts_equal_one_rank(judge, recipe, layout):
    check(judge, EP_LAYOUTS[layout], EXPERTS, recipe, OTHER_SCALES, LATER_STEPS_OF_EXPERTS)


def test_fp8_is_not_fp32(judge):
    """The control: what passes above is no run in fp32."""
    sections = {"model": MODEL, "precision": {"fp8": {"recipe": "tensorwise", "backend": "emulated"}}}
    difference = judge.reference(**sections).losses[0] / judge.reference(model=MODEL).losses[0] - 1
    assert 1e-5 < abs(difference) < 1e-2


def test_recomputation_changes_nothing(judge):
    sections = {"model": MODEL, "precision": {"fp8": {"recipe": "delayed", "backend": "emulated"}}}
    plain, recomputed = (
        judge.run(2, {"tp": 2, "sp": True}, train={"recompute": {"granularity": granularity}}, **sections)
        for granularity in ("none", "full")
    )
    assert recomputed.losses == plain.losses and recomputed.grad_norms == plain.grad_norms


def test_the_size_of_microbatches_changes_no_scale(judge):
    sections = {"model": MODEL, "precision": {"fp8": {"recipe": "delayed", "backend": "emulated"}}}
    run = judge.run(1, {}, train={"micro_batch_size": 4}, **sections)
    np.testing.assert_allclose(run.losses[0], judge.reference(**sections).losses[0], rtol=FIRST_STEP)
    np.testing.assert_allclose(run.losses, judge.reference(**sections).losses, rtol=LATER_STEPS)


def train_and_save(place: Place, config: Config, run_dir: str) -> tuple[list[float], list[float], np.ndarray]:
    """Train to the end, saving after step 2 on the way; return losses and norms after it, and the history then."""
    from trainer.engine.state import TrainState

    with open_engine(place, config) as engine:
        stage = build_stage(engine)
        state, _ = train_steps(stage, TrainState(), 2)
        save_checkpoint(engine, state, stage, Path(run_dir))
        history = engine.fp8.history.values.numpy().copy()
        _, results = train_steps(stage, state, 2)
        return [one.loss for one in results], [one.grad_norm for one in results], history


def resume_and_train(place: Place, config: Config, run_dir: str) -> tuple[list[float], list[float], np.ndarray]:
    """Train on from the checkpoint; return the same, with the history that was loaded."""
    from trainer.checkpoint.layout import resolve_checkpoint
    from trainer.checkpoint.load import resume

    with open_engine(place, config) as engine:
        stage = build_stage(engine)
        state = resume(engine.config, engine.mesh, stage, resolve_checkpoint(run_dir))
        history = engine.fp8.history.values.numpy().copy()
        _, results = train_steps(stage, state, 2)
        return [one.loss for one in results], [one.grad_norm for one in results], history


def delayed_config(world, parallel, model, length=4):
    fp8 = {"recipe": "delayed", "backend": "emulated", "amax_history_len": length, "amax_compute": "max"}
    return small_config(world, parallel=parallel, model=model, precision={"fp8": fp8})


@pytest.mark.parametrize("model", [MODEL, EXPERTS], ids=["dense", "experts"])
def test_history_survives_a_change_of_layout(ranks, tmp_path, model):
    saved = ranks.run(train_and_save, delayed_config(1, {}, model), str(tmp_path))[0]
    again = ranks.run(resume_and_train, delayed_config(1, {}, model), str(tmp_path))[0]
    assert again[:2] == saved[:2] and np.array_equal(again[2], saved[2])
    assert (saved[2][..., :2] > 0).all() and not saved[2][..., 2:].any()
    layout = {"ep": 2, "tp": 2, "sp": True} if "moe" in model else {"tp": 2, "pp": 2}
    parts = ranks.run(resume_and_train, delayed_config(4, layout, model), str(tmp_path), world=4)
    found = parts[0][2] if "moe" in model else np.concatenate([parts[0][2], parts[2][2]])
    assert np.array_equal(found, saved[2])
    np.testing.assert_allclose(parts[0][0], saved[0], rtol=LATER_STEPS_OF_EXPERTS)
    np.testing.assert_allclose(parts[0][0][0], saved[0][0], rtol=OTHER_SCALES if "moe" in model else 1e-5)


def test_another_length_of_history(ranks, tmp_path):
    saved = ranks.run(train_and_save, delayed_config(1, {}, MODEL), str(tmp_path))[0]
    for length in (1, 9):
        _, _, history = ranks.run(resume_and_train, delayed_config(1, {}, MODEL, length), str(tmp_path))[0]
        kept = min(length, 4)
        assert np.array_equal(history[..., :kept], saved[2][..., :kept]) and not history[..., kept:].any()
