"""One training step: what skips an update, what precision changes, and that vocabulary padding is invisible."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from configs.stages import Config
from tests.pool import Place
from tests.small_runs import VOCAB_SIZE, RunRecord, build_stage, open_engine, record_run, small_config, train_steps

LAYOUTS = {"dp2": (2, {}), "tp2_pp2": (4, {"tp": 2, "pp": 2}), "vpp2_dp2": (4, {"pp": 2, "vpp": 2})}


def poison_loss(engine: Any, stage: Any, value: float) -> Any:
    """Multiply one microbatch's loss on the highest rank that computes one; return what undoes it."""
    plain = stage.objective.loss
    has_loss = engine.mesh.is_last_pp_stage and engine.mesh.dp_rank == engine.mesh.dp_size - 1

    def loss(output: Any, batch: Any) -> Any:
        if has_loss and batch.sample_ids[0] >= 4:
            output = output * value
        return plain(output, batch)

    stage.objective.loss = loss
    return lambda: setattr(stage.objective, "loss", plain)


def poison_gradient(engine: Any, stage: Any, value: float) -> Any:
    """Set one element of a tensor-parallel weight's gradient on the last rank alone; all losses stay finite."""
    return spoil_one_rank(engine, engine.chunks[-1].decoder.layers[-1].mlp.linear_fc2.weight, value)


def poison_norm_gradient(engine: Any, stage: Any, value: float) -> Any:
    """Do so for a weight that all tp ranks hold, which the gradient norm counts on tp rank 0 alone."""
    return spoil_one_rank(engine, engine.chunks[-1].decoder.layers[-1].input_layernorm.weight, value)


def spoil_one_rank(engine: Any, parameter: Any, value: float) -> Any:
    """Hook the parameter on the last rank; return what takes the hook away."""
    if engine.mesh.rank != engine.mesh.world_size - 1:
        return lambda: None

    def spoil(gradient: Any) -> Any:
        parameter.main_grad.view(-1)[0] = value  # where gradients add up; linears put nothing into `gradient`
        return gradient

    return parameter.register_hook(spoil).remove


def step_with_fault(place: Place, config: Config, poison: Any, value: float) -> dict[str, Any]:
    """Take a good step, a poisoned one and a good one; return what they did and whether the weights moved."""
    import torch

    from trainer.engine.state import TrainState

    def weights() -> list[Any]:
        return [parameter.detach().clone() for chunk in engine.chunks for parameter in chunk.parameters()]

    def is_unchanged(before: list[Any]) -> bool:
        return all(torch.equal(one, other) for one, other in zip(before, weights(), strict=True))

    with open_engine(place, config) as engine:
        stage = build_stage(engine)
        state, _ = train_steps(stage, TrainState(), 1)
        good = weights()
        cure = poison(engine, stage, value)
        state, (bad,) = train_steps(stage, state, 1)
        was_kept, in_a_row = is_unchanged(good), state.num_nonfinite_in_a_row
        cure()
        state, (after,) = train_steps(stage, state, 1)
        return {
            "bad": bad, "after": after, "was_kept": was_kept, "moved_after": not is_unchanged(good),
            "in_a_row": in_a_row, "state": state,
        }  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "poison, value",
    [
        pytest.param(poison_loss, math.nan, id="nan_loss"),
        pytest.param(poison_loss, math.inf, id="inf_loss", marks=pytest.mark.slow),
        pytest.param(poison_gradient, math.nan, id="nan_gradient", marks=pytest.mark.slow),
        pytest.param(poison_gradient, math.inf, id="inf_gradient"),
        pytest.param(poison_norm_gradient, math.nan, id="nan_norm_gradient"),
    ],
)
def test_a_non_finite_number_on_one_rank_skips_the_update_on_all(ranks, layout, poison, value):
    world, parallel = LAYOUTS[layout]
    for done in ranks.run(step_with_fault, small_config(world, parallel=parallel), poison, value, world=world):
        assert not done["bad"].is_applied and not done["bad"].is_overflow_expected
        assert math.isfinite(done["bad"].loss) == (poison is not poison_loss)
        assert done["was_kept"], "the weights changed"
        assert done["in_a_row"] == 1 and done["state"].num_skipped_steps == 1
        assert done["after"].is_applied and math.isfinite(done["after"].loss) and done["moved_after"]
        assert done["state"].num_nonfinite_in_a_row == 0 and done["state"].step == 3


def step_on_nothing(place: Place, config: Config) -> tuple[bool, list[Any], Any]:
    """Take two steps of which nothing counts and a good one; return whether the weights stayed, results and state."""
    import torch

    from trainer.engine.state import TrainState

    with open_engine(place, config) as engine:
        stage = build_stage(engine)
        plain = stage.reader.read_step

        def read_nothing() -> list[Any]:
            batches = plain()
            for batch in batches:
                batch.loss_mask.zero_()
            return batches

        before = [parameter.detach().clone() for chunk in engine.chunks for parameter in chunk.parameters()]
        stage.reader.read_step = read_nothing
        state, empty = train_steps(stage, TrainState(), 2)
        after = [parameter for chunk in engine.chunks for parameter in chunk.parameters()]
        stayed = all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
        stage.reader.read_step = plain
        state, good = train_steps(stage, state, 1)
        return stayed, empty + good, state


@pytest.mark.parametrize("precision", [{"compute": "fp32"}, {"compute": "fp16", "initial_loss_scale": 64.0}])
@pytest.mark.parametrize("layout", ["dp2", pytest.param("tp2_pp2", marks=pytest.mark.slow)])
def test_a_batch_of_which_nothing_counts_is_a_step_without_an_update(ranks, layout, precision):
    world, parallel = LAYOUTS[layout]
    config = small_config(world, parallel=parallel, precision=precision)
    for stayed, results, state in ranks.run(step_on_nothing, config, world=world):
        assert stayed and [result.is_empty for result in results] == [True, True, False]
        assert [result.is_applied for result in results] == [False, False, True]
        assert not any(result.is_fault for result in results) and results[0].loss == 0.0
        assert (state.step, state.num_empty_steps, state.num_nonfinite_in_a_row) == (3, 2, 0)
        assert state.consumed_samples == 24 and state.num_skipped_steps == 2


def fill_by_name(engine: Any) -> None:
    """Set every weight by its name and its real rows alone; rows of padded ids get large values."""
    import zlib

    import torch

    for chunk in engine.chunks:
        for name, parameter in chunk.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            is_vocabulary = "word_embeddings" in name or "output_layer" in name
            shape = (VOCAB_SIZE, parameter.shape[1]) if is_vocabulary else parameter.shape
            values = torch.randn(shape, generator=generator) * 0.05 + (1.0 if parameter.dim() == 1 else 0.0)
            parameter.data.fill_(9.0)
            parameter.data[: shape[0]] = values
    engine.optimizer.reload_model_params()


def run_filled(place: Place, config: Config) -> RunRecord:
    """Train from weights that do not depend on the padding."""
    from trainer.engine.state import TrainState

    with open_engine(place, config) as engine:
        fill_by_name(engine)
        stage = build_stage(engine, "uneven")
        _, results = train_steps(stage, TrainState(), config.train.num_steps)
        return record_run(engine, results)


@pytest.mark.parametrize("multiple", [16, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("tie_embeddings", [False, True], ids=["untied", "tied"])
def test_vocabulary_padding_is_invisible(ranks, multiple, tie_embeddings):
    model = {"tie_embeddings": tie_embeddings, "vocab_pad_multiple": 1}
    (plain,) = ranks.run(run_filled, small_config(model=model))
    (padded,) = ranks.run(run_filled, small_config(model=model | {"vocab_pad_multiple": multiple}))
    assert plain.logits.shape[-1] == VOCAB_SIZE == padded.logits.shape[-1]
    np.testing.assert_allclose(padded.losses, plain.losses, rtol=1e-6)
    np.testing.assert_allclose(padded.logits, plain.logits, rtol=0, atol=1e-4)
    # Weight decay applies to padded rows, gradients do not: clipping must see the same norm.
    np.testing.assert_allclose(padded.grad_norms, plain.grad_norms, rtol=1e-5)


def run_plain(place: Place, config: Config, num_steps: int) -> list[Any]:
    """Return the results of a number of steps from weights that do not depend on the precision."""
    from trainer.engine.state import TrainState

    with open_engine(place, config) as engine:
        if place.world_size == engine.mesh.dp_size:
            fill_by_name(engine)
        return train_steps(build_stage(engine), TrainState(), num_steps)[1]


@pytest.mark.parametrize("layout", ["dp2", pytest.param("tp2_pp2", marks=pytest.mark.slow)])
def test_fp16_finds_its_loss_scale(ranks, layout):
    world, parallel = LAYOUTS[layout]
    precision = {"compute": "fp16", "initial_loss_scale": 2.0**18, "loss_scale_hysteresis": 1, "loss_scale_window": 2}
    config = small_config(world, parallel=parallel, precision=precision)
    per_rank = ranks.run(run_plain, config, 16, world=world)
    for results in per_rank:
        applied = [result.is_applied for result in results]
        assert not applied[0] and results[0].is_overflow_expected
        first = applied.index(True)
        scales = [result.loss_scale for result in results]
        assert scales[: first + 1] == [2.0 ** (18 - step) for step in range(first + 1)]
        assert 2 <= first <= 9 and all(math.isfinite(result.loss) for result in results)
        grown = [later / earlier for earlier, later in zip(scales, scales[1:], strict=False)]
        assert 2.0 in grown[first:], "two finite steps in a row double the scale"
    assert all([step.loss for step in results] == [step.loss for step in per_rank[0]] for results in per_rank)


def movements(place: Place, config: Config) -> list[tuple[str, float, float]]:
    """Return of each weight its name, its largest movement in a step, and the largest beside decay, in units of lr."""
    from trainer.engine.state import TrainState

    with open_engine(place, config) as engine:
        fill_by_name(engine)
        before = {name: value.detach().clone() for name, value in engine.chunks[0].named_parameters()}
        _, (result,) = train_steps(build_stage(engine), TrainState(), 1)
        found = []
        for name, value in engine.chunks[0].named_parameters():
            moved = (value.detach() - before[name]) / result.learning_rate
            beside = moved + config.optimizer.weight_decay * before[name]
            found.append((name, float(moved.abs().max()), float(beside.abs().max())))
        return found


def test_norms_and_biases_do_not_decay(ranks):
    """Adam's first step is lr * g / (|g| + eps), at most lr; decay comes on top (arXiv:1711.05101, algorithm 2)."""
    optimizer = {"lr": 1e-3, "min_lr": 1e-3, "weight_decay": 2.0, "eps": 1e-12}
    model = {"qk_norm": True, "qkv_bias": True}
    (found,) = ranks.run(movements, small_config(optimizer=optimizer, model=model))
    vectors = [one for one in found if "norm" in one[0] or one[0].endswith("bias")]
    matrices = [one for one in found if one not in vectors]
    assert len(vectors) == 4 * 5 + 1 and len(matrices) == 4 * 4 + 1 + (not small_config().model.tie_embeddings)
    assert all(moved < 1.01 for _, moved, _ in vectors), vectors
    assert all(beside < 1.01 < moved for _, moved, beside in matrices), matrices


def biases_of_steps(place: Place, config: Config) -> list[list[float]]:
    """Return the routers' biases before any step, after an empty one, one with a NaN, and a good one."""
    import torch

    def biases(engine):
        modules = (module for chunk in engine.chunks for module in chunk.modules())
        return [value for one in modules if getattr(one, "expert_bias", None) is not None for value in one.expert_bias]

    with open_engine(place, config) as engine:
        stage = build_stage(engine)
        reader, found = stage.reader, [[float(value) for value in biases(engine)]]
        for kind in ("empty", "nan", "good"):
            batches = reader.read_step()
            if kind == "empty":
                batches = [replace(batch, loss_mask=torch.zeros_like(batch.loss_mask)) for batch in batches]
            if kind == "nan":
                weight = next(parameter for parameter in engine.chunks[0].parameters() if parameter.dim() == 1)
                kept = weight.detach().clone()
                weight.data.fill_(math.nan)
            result = engine.train_step(batches, stage.objective, 1e-3)
            assert result.is_applied == (kind == "good")
            if kind == "nan":
                weight.data.copy_(kept)
            found.append([float(value) for value in biases(engine)])
        return found


def test_a_step_that_is_not_taken_moves_no_routers_bias(ranks):
    model = {"moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 64, "balancing": "bias"}}
    model["moe"]["score_function"] = "sigmoid"
    (found,) = ranks.run(biases_of_steps, small_config(model=model))
    assert len(found[0]) == 16 and found[0] == found[1] == found[2] != found[3]


def run_for_scales(place: Place, config: Config, num_steps: int) -> list[tuple[list[float], bool]]:
    """Return after each step the loss scale of every part of the optimizer, and whether it was applied."""
    from trainer.engine.state import TrainState

    with open_engine(place, config) as engine:
        stage, state, found = build_stage(engine), TrainState(), []
        for _ in range(num_steps):
            state, (result,) = train_steps(stage, state, 1)
            scales = [float(part.grad_scaler.scale) for part in engine.optimizer.chained_optimizers]
            found.append((scales, result.is_applied))
        return found


def test_fp16_scales_experts_as_the_rest(ranks):
    """Under expert parallelism they have an optimizer of their own; an infinity in either is one of both."""
    model = {"moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 64, "balancing": "none"}}
    precision = {"compute": "fp16", "initial_loss_scale": 2.0**22, "loss_scale_hysteresis": 1, "loss_scale_window": 4}
    config = small_config(2, parallel={"ep": 2}, model=model, precision=precision)
    for found in ranks.run(run_for_scales, config, 20, world=2):
        assert all(len(scales) == 2 and scales[0] == scales[1] for scales, _ in found), found
        applied = [is_applied for _, is_applied in found]
        assert not applied[0] and any(applied)
        # The loss has been scaled by what the step before left.
        assert found[0][0][0] == 2.0**21 and found[applied.index(True)][0][0] < 2.0**18


def test_fp16_at_its_smallest_scale_is_a_fault(ranks):
    """A loss scale that cannot shrink any further must count as non-finite, not as the search for a scale."""
    scale = 2.0**24
    precision = {"compute": "fp16", "initial_loss_scale": scale, "min_loss_scale": scale, "loss_scale_hysteresis": 1}
    (results,) = ranks.run(run_plain, small_config(precision=precision), 2)
    assert [result.is_applied for result in results] == [False, False]
    assert not results[-1].is_overflow_expected


@pytest.mark.parametrize("compute", ["bf16", "fp16"])
def test_half_precision_follows_fp32(ranks, compute):
    exact = ranks.run(run_plain, small_config(), 5)[0]
    scale = {"initial_loss_scale": 64.0} if compute == "fp16" else {}  # no step may be lost to an overflow
    half = ranks.run(run_plain, small_config(precision={"compute": compute} | scale), 5)[0]
    losses = [result.loss for result in half]
    np.testing.assert_allclose(losses, [result.loss for result in exact], rtol=2e-3)
    assert losses != [result.loss for result in exact]


def test_bf16_on_a_layout_follows_fp32(ranks):
    exact = ranks.run(run_plain, small_config(), 5)[0]
    config = small_config(2, parallel={}, precision={"compute": "bf16"})
    half = ranks.run(run_plain, config, 5, world=2)[0]
    np.testing.assert_allclose([result.loss for result in half], [result.loss for result in exact], rtol=2e-3)


def evaluate_twice(place: Place, config: Config) -> tuple[Any, float, bool]:
    """Return the sums of an evaluation, the loss of a step on the same batch, and whether weights stayed."""
    import torch

    with open_engine(place, config) as engine:
        stage = build_stage(engine, "uneven")
        batches = stage.reader.read_step()
        before = [parameter.detach().clone() for parameter in engine.chunks[0].parameters()]
        sums = engine.sum_losses(batches, stage.objective)
        stayed = all(map(torch.equal, before, engine.chunks[0].parameters()))
        result = engine.train_step(batches, stage.objective, 1e-3)
        return sums, result.loss, stayed


@pytest.mark.parametrize("layout", ["dp2", "tp2_pp2", "vpp2_dp2"])
def test_evaluation_sums_over_ranks_and_changes_nothing(ranks, layout):
    world, parallel = LAYOUTS[layout]
    for sums, loss, stayed in ranks.run(evaluate_twice, small_config(world, parallel=parallel), world=world):
        assert stayed and sums.num_samples == 8 and sums.num_input_tokens == 8 * 32
        assert sums.total / sums.num_tokens == pytest.approx(loss, rel=1e-6)
