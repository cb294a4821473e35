"""A minibatch's loss and its gradient against TRL's own `GRPOTrainer._compute_loss` on the same numbers."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from configs.sections.grpo import GrpoSection
from tests.small_rollouts import make_rollouts
from trainer.rl.objective import ADVANTAGES, OLD, REFERENCE, SAMPLED, PolicyObjective
from trainer.rl.placement import Placement

SEQ_LEN, MAX_NEW_TOKENS = 40, 9
ROLLOUTS = make_rollouts()
LENGTHS = [len(rollout.token_ids) - 1 for rollout in ROLLOUTS]
NO_KL = {"kl": {"coefficient": 0.0}}
# The section's fields, and what TRL calls the same; TRL's cispo states the largest ratio itself.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({"algorithm": "grpo", "kl": {"coefficient": 0.3}}, {"loss_type": "grpo", "beta": 0.3}),
    "dr_grpo": ({"algorithm": "dr_grpo"}, {"loss_type": "dr_grpo"}),
    "dapo": ({"algorithm": "dapo"}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "entropy": (
        {"algorithm": "dapo", "entropy_bonus": 0.1},
        {"loss_type": "dapo", "epsilon_high": 0.28, "entropy_coef": 0.1, "_entropy_bonus_enabled": True},
    ),
    "cispo": ({"algorithm": "cispo", "clip_high": 0.3}, {"loss_type": "cispo", "epsilon_high": 1.3}),
    "gspo": (
        {"algorithm": "gspo", "clip_low": 0.03, "clip_high": 0.04},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 0.03, "epsilon_high": 0.04},
    ),
    "sum_of_answer": ({"normalisation": "sequence_sum", **NO_KL}, {"loss_type": "luspo"}),
    "sum_by_answer": (
        {"normalisation": "sequence_sum", "ratio": "sequence", **NO_KL},
        {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    ),
    "importance": (
        {"algorithm": "dapo", "importance_cap": 1.2, "kl": {"coefficient": 0.3}},
        {"loss_type": "dapo", "epsilon_high": 0.28, "use_vllm": True, "beta": 0.3},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def group():
    """Return a process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def make_values() -> dict[str, list[np.ndarray]]:
    """Return numbers of each rollout's predictions, exact in fp32."""
    random = np.random.default_rng(2)
    draw = lambda centre, spread: [random.normal(centre, spread, length) for length in LENGTHS]  # noqa: E731
    new = draw(-2.0, 0.5)
    near = lambda spread: [one + random.normal(0, spread, len(one)) for one in new]  # noqa: E731
    values = {
        "new": new, "entropy": draw(3.0, 0.5), OLD: near(0.2), SAMPLED: near(0.3), REFERENCE: near(0.6),
        ADVANTAGES: [np.full(length, random.normal()) for length in LENGTHS],
    }  # fmt: skip
    return {name: [one.astype(np.float32).astype(np.float64) for one in columns] for name, columns in values.items()}


def compute_ours(section: GrpoSection, group: Any, values: dict[str, list[np.ndarray]]) -> Any:
    """Return the loss, the figures and the gradient of the log-probabilities and entropies of each rollout."""
    mesh: Any = SimpleNamespace(dp_size=1, dp_rank=0, pp_size=1, vpp_size=1)
    placement = Placement(LENGTHS, SEQ_LEN, 7, mesh)
    objective = PolicyObjective(section.method, temperature=1.0, max_new_tokens=MAX_NEW_TOKENS, cp_group=group)
    (batch,) = placement.build(ROLLOUTS)
    batch = objective.finish(batch)
    laid = {name: placement.column(columns)[0].double() for name, columns in values.items()}
    batch.columns.update(laid)  # type: ignore[attr-defined]
    output = torch.stack([laid["new"], laid["entropy"]]).requires_grad_()
    loss, count = objective.loss(output, batch), objective.count(batch)
    mean = loss.total / count
    mean.backward()
    assert output.grad is not None
    gradients = [placement.take_back([[column.numpy()]]) for column in output.grad]
    figures = {name: float(mean.total / mean.count) for name, mean in loss.means.items()}
    return mean.item(), figures, gradients


def pad(columns: list[np.ndarray]) -> torch.Tensor:
    """Return `[rollouts, longest]`, numbers where a rollout has no prediction."""
    rows = torch.full((len(columns), max(LENGTHS)), -1.0, dtype=torch.float64)
    for row, column in zip(rows, columns, strict=True):
        row[: len(column)] = torch.from_numpy(column)
    return rows


def compute_theirs(options: dict[str, Any], values: dict[str, list[np.ndarray]]) -> Any:
    """Return what TRL's method makes of the same numbers: its model's scores are given, everything else is its own."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    new, entropy = (pad(values[name]).requires_grad_() for name in ("new", "entropy"))
    mask = torch.stack([pad([rollout.trained().astype(float) for rollout in ROLLOUTS])])[0].clamp(min=0)
    ones = torch.ones_like(mask)
    same = lambda value, **_: value  # noqa: E731
    trainer = {
        "_get_per_token_logps_and_entropies": lambda *_, **__: (new, entropy, None), "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "importance_sampling_level": "token",
        "beta": 0.0, "epsilon_low": 0.2, "epsilon_high": 0.2, "use_vllm": False, "entropy_coef": 0.0,
        "vllm_importance_sampling_correction": True, "model": SimpleNamespace(training=True),
        "args": SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        "current_gradient_accumulation_steps": 1, "max_completion_length": MAX_NEW_TOKENS,
        "accelerator": SimpleNamespace(
            gather=same, reduce=same, gather_for_metrics=same, num_processes=1, sync_gradients=True
        ),
        "_entropy_bonus_enabled": False, "use_adaptive_entropy": False,
        "_metrics": defaultdict(lambda: defaultdict(list)), **options,
    }  # fmt: skip
    inputs = {
        "prompt_ids": ones[:, :1], "prompt_mask": ones[:, :1], "completion_ids": ones, "completion_mask": ones,
        "tool_mask": mask, "old_per_token_logps": pad(values[OLD]), "ref_per_token_logps": pad(values[REFERENCE]),
        "advantages": pad(values[ADVANTAGES])[:, 0], "num_items_in_batch": mask.sum(),
        "importance_sampling_ratio": (pad(values[OLD]) - pad(values[SAMPLED])).exp().clamp(max=1.2),
    }  # fmt: skip
    loss = GRPOTrainer._compute_loss(SimpleNamespace(**trainer), None, inputs)
    loss.backward()
    figures = {name: found[-1] for name, found in trainer["_metrics"]["train"].items()}  # type: ignore[index]
    return loss.item(), figures, [new.grad, entropy.grad]


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_of_trl(group, name):
    fields, options = CASES[name]
    values = make_values()
    loss, figures, gradients = compute_ours(GrpoSection(**fields), group, values)
    their_loss, their_figures, their_gradients = compute_theirs(options, values)
    assert loss == pytest.approx(their_loss, rel=1e-6) and abs(loss) > 1e-3
    for ours, theirs in zip(gradients, their_gradients, strict=True):
        for number, own in enumerate(ours):
            expected = np.zeros(LENGTHS[number]) if theirs is None else theirs[number, : LENGTHS[number]].numpy()
            np.testing.assert_allclose(own, expected, rtol=1e-6, atol=1e-9)
    assert figures["actor/entropy"] == pytest.approx(their_figures["entropy"], rel=1e-6)
    if "kl" in their_figures:
        assert figures["actor/kl"] == pytest.approx(their_figures["kl"], rel=1e-6)
    if "clip_ratio/region_mean" in their_figures and options.get("importance_sampling_level") is None:
        assert figures["actor/clip_frac"] == pytest.approx(their_figures["clip_ratio/region_mean"])
    assert 0 < figures["actor/clip_frac"] < 1, "a case in which nothing, or all, is clipped tells little"


def test_without_old_log_probabilities_the_policy_itself_is_the_old_one(group):
    """Ratios are 1, nothing is clipped, and the gradient of a token is -A over the number of tokens."""
    values = make_values()
    del values[OLD]
    _, figures, (gradient, _) = compute_ours(GrpoSection(algorithm="dapo"), group, values)
    count = sum(rollout.num_sampled for rollout in ROLLOUTS)
    for rollout, own, advantages in zip(ROLLOUTS, gradient, values[ADVANTAGES], strict=True):
        np.testing.assert_allclose(own, np.where(rollout.trained(), -advantages / count, 0), rtol=1e-6)
    assert figures["actor/clip_frac"] == figures["actor/ppo_kl"] == 0
    difference = [
        np.abs(new - sampled)[rollout.trained()]
        for rollout, new, sampled in zip(ROLLOUTS, values["new"], values[SAMPLED], strict=True)
    ]
    assert figures["rollout/logprob_difference"] == pytest.approx(np.concatenate(difference).mean(), rel=1e-6)


def test_what_the_policy_did_not_draw_is_never_looked_at(group):
    """Not even where its numbers are none: prompts, what an environment says, and padding."""
    section = GrpoSection(algorithm="grpo", importance_cap=2.0)
    values = make_values()
    expected = compute_ours(section, group, values)
    for name in ("new", "entropy"):
        for rollout, column in zip(ROLLOUTS, values[name], strict=True):
            column[~rollout.trained()] = np.nan
    loss, figures, gradients = compute_ours(section, group, values)
    assert (loss, figures) == expected[:2]
    for found, others in zip(gradients, expected[2], strict=True):
        for own, other in zip(found, others, strict=True):
            np.testing.assert_array_equal(own, other)
