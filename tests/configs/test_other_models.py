"""Memory of several models: the sums written down by hand, at once and by turns."""

import dataclasses

import pytest

from configs.plan.derive import derive_layout, padded_vocab_size
from configs.plan.estimate import count_parameters, estimate_stages
from configs.plan.others import OtherModel, estimate_together
from tests.small_runs import small_config


def make(**changed):
    config = small_config(4, parallel={"tp": 2, "pp": 2}, precision={"compute": "bf16"})
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update=changed)})
    deep = small_config(model={"num_layers": 8}, precision={"compute": "bf16"})
    wide = small_config(model={"hidden_size": 128}, precision={"compute": "bf16"})
    others = {"critic": OtherModel(deep, "scalar", True), "reward": OtherModel(wide, "scalar", False)}
    return config, derive_layout(config, 4), others


def state(stage):
    return stage.weights + stage.gradients + stage.optimizer


@pytest.mark.parametrize("offload", [False, True])
def test_the_fullest_rank_is_the_sum_or_the_largest_turn(offload):
    config, layout, others = make(offload_models=offload)
    own = estimate_stages(config, layout)
    critic = estimate_stages(others["critic"].on_layout(config), layout)
    reward = estimate_stages(others["reward"].on_layout(config), layout)
    totals = []
    for policy, value, score in zip(own, critic, reward, strict=True):
        learnt = state(value) + value.activations + value.logits  # of a scalar head the latter are its input
        if offload:
            totals.append(max(policy.total, policy.weights + learnt, policy.weights + score.weights + score.logits))
        else:
            working = max(policy.activations + policy.logits, value.activations + value.logits, score.logits)
            totals.append(state(policy) + state(value) + score.weights + working)
    found = estimate_together(config, layout, others)
    assert found.total == max(totals)
    assert dataclasses.replace(found, other_models=0) in own
    assert found.other_models > 0


def test_a_scalar_head_has_no_output_matrix():
    config, layout, _ = make()
    model = config.model.model_copy(update={"tie_embeddings": False})
    own = config.model_copy(update={"model": model})
    scalar, plain = (OtherModel(own, head, False) for head in ("scalar", "vocabulary"))
    (_, last), (_, whole) = scalar.estimate(config, layout), plain.estimate(config, layout)
    padded, hidden = padded_vocab_size(model), model.hidden_size
    assert whole.weights - last.weights == 2 * (padded // 2 * hidden - hidden)  # tp2, two bytes each
    count = count_parameters(model).total - (model.vocab_size - 1) * hidden
    assert scalar.describe() == f"{count:,} parameters, frozen, a scalar head"


def test_by_turns_takes_less_and_alone_nothing_more():
    config, layout, others = make()
    turns, *_ = make(offload_models=True)
    assert estimate_together(turns, layout, others).total < 0.7 * estimate_together(config, layout, others).total
    assert estimate_together(config, layout, {}).other_models == 0
