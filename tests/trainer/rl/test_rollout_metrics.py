"""What a step of reinforcement learning reports, of rollouts and reports made up by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.small_rollouts import make_rollout
from trainer.engine.state import StepResult
from trainer.generate.report import GenerationReport, ReplicaReport
from trainer.rl.metrics import combine, describe_rewards, describe_rollouts, describe_work, find_useful_groups

# Group 0: scores 1 and 0. Group 1: twice 1, of three that failed once. Group 2: one alone, the other failed.
ROLLOUTS = [
    make_rollout((2, 3), 0, 0, score=1.0, rewards={"exact": 1.0, "length": None}),
    make_rollout((2, 5), 0, 1, score=0.0, rewards={"exact": 0.0, "length": -0.5}, finish="length"),
    make_rollout((4, 1, 2, 1), 1, 0, score=1.0, rewards={"exact": 1.0, "length": -0.1}),
    make_rollout((4, 4), 1, 1, score=1.0, rewards={"exact": 1.0, "length": 0.0}),
    make_rollout((4, 6), 1, 2, score=None, rewards={"exact": None, "length": 0.0}, faults={"exact": "raised"}),
    make_rollout((3, 1), 2, 0, score=0.5, rewards={"exact": 0.5, "length": 0.0}),
    make_rollout((3, 8), 2, 1, score=None, rewards={"exact": None}, finish="length"),
]
ADVANTAGES = {
    rollout.key: rollout.lay([value] * rollout.num_sampled)
    for rollout, value in zip(ROLLOUTS, [0.5, -0.5, 2.0, 0.0, 9.0, 0.0, 9.0], strict=True)
    if rollout.score is not None
}


def test_rollouts_are_counted_and_those_that_failed_have_no_score():
    figures = describe_rollouts(ROLLOUTS, ADVANTAGES)
    lengths = [3, 5, 2, 4, 6, 1, 8]
    expected = {
        "response_length/mean": np.mean(lengths), "response_length/max": 8, "response_length/min": 1,
        "response_length/clip_ratio": 2 / 7, "prompt_length/mean": (2 + 2 + 4 + 4 + 4 + 3 + 3) / 7,
        "critic/score/mean": 3.5 / 5, "critic/score/max": 1, "critic/score/min": 0,
        "critic/advantages/mean": (0.5 * 3 - 0.5 * 5 + 2 * 2 + 0 + 0) / 15,
        "critic/advantages/max": 2, "critic/advantages/min": -0.5,
        "reward/exact/mean": 3.5 / 5, "reward/length/mean": -0.6 / 5, "reward/num_failed": 2,
        "rollout/num_groups": 3, "rollout/num_equal_groups": 2,
    }  # fmt: skip
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value), name
    assert find_useful_groups(ROLLOUTS) == {0}


def test_rewards_are_scores_less_the_divergence_that_is_rewarded():
    divergences = {rollout.key: rollout.lay([0.1] * rollout.num_sampled) for rollout in ROLLOUTS}
    divergences[2, 0] = ROLLOUTS[5].lay([0.7])
    figures = describe_rewards(ROLLOUTS, divergences, 2.0)
    # Scores 1 0 1 1 0.5, of 3 5 2 4 1 tokens drawn.
    expected = [1 - 0.6, -1.0, 1 - 0.4, 1 - 0.8, 0.5 - 1.4]
    assert figures["critic/rewards/mean"] == pytest.approx(sum(expected) / 5)
    assert (figures["critic/rewards/max"], figures["critic/rewards/min"]) == pytest.approx((0.6, -1.0))
    assert figures["actor/kl"] == pytest.approx((1.4 + 0.7) / 15)
    plain = describe_rewards(ROLLOUTS, None, 0.04)
    assert plain == {"critic/rewards/mean": pytest.approx(0.7), "critic/rewards/max": 1, "critic/rewards/min": 0}
    assert np.isfinite(list(describe_rewards([], {}, 1.0).values())).all()


def test_a_step_of_which_every_reward_failed_still_reports():
    failed = [replace(rollout, score=None, rewards={"exact": None}) for rollout in ROLLOUTS]
    figures = describe_rollouts(failed, {})
    assert figures["reward/num_failed"] == 7 and figures["critic/score/mean"] == 0
    assert np.isfinite(list(figures.values())).all() and find_useful_groups(failed) == set()
    assert np.isfinite(list(describe_rollouts([], {}).values())).all()


def test_phases_and_idle_time_are_those_of_the_calls():
    def report(*seconds: float) -> GenerationReport:
        parts = enumerate(seconds)
        return GenerationReport(tuple(ReplicaReport(rank, 7, 10 * (rank + 1), 3, 4, 100, took) for rank, took in parts))

    seconds = {"generate": 6.0, "reward": 1.0, "score": 2.0, "forward_backward": 3.0, "optimizer": 1.0}
    figures = describe_work(29, seconds, [report(2.0, 4.0), report(2.0, 1.0)])
    assert figures["timing_s/generate_sequences"] == 6 and figures["timing_s/reward"] == 1
    assert figures["timing_s/score"] == 2 and figures["timing_s/update_actor"] == 4 and figures["timing_s/step"] == 13
    # Two calls of 30 tokens; each waits for its slowest, 4 and 2 seconds, of which the replicas worked 4 and 5.
    assert figures["perf/generated_tokens_per_second"] == pytest.approx(60 / 6)
    assert figures["rollout/idle_share/dp_0"] == pytest.approx(2 / 6)
    assert figures["rollout/idle_share/dp_1"] == pytest.approx(1 / 6)
    assert figures["perf/trained_tokens_per_second"] == pytest.approx(29 / 4)


def result(loss: float = 1.0, count: int = 4, **more) -> StepResult:
    fields = {
        "num_tokens": 10, "num_input_tokens": 20, "num_attended_pairs": 30, "num_samples": 2, "grad_norm": 1.0,
        "learning_rate": 0.1, "is_applied": True, "is_overflow_expected": False, "loss_scale": 8.0,
        "next_loss_scale": 4.0, "metrics": {"actor/entropy": 1.0}, "phase_seconds": {"optimizer": 1.0},
    }  # fmt: skip
    return StepResult(loss=loss, count=count, **fields | more)  # type: ignore[arg-type]


def test_updates_of_a_step_are_one_result():
    both = combine([
        result(1.0, 4, loss_scale=16.0, metrics={"actor/entropy": 1.0}, grad_norm=1.0),
        result(3.0, 12, num_tokens=30, metrics={"actor/entropy": 2.0}, grad_norm=3.0),
    ])  # fmt: skip
    assert (both.loss, both.count, both.num_tokens, both.num_input_tokens) == (2.5, 16, 40, 40)
    assert (both.num_attended_pairs, both.num_samples, both.grad_norm) == (60, 4, 2.0)
    assert (both.loss_scale, both.next_loss_scale) == (16.0, 4.0) and both.is_applied and not both.is_fault
    assert both.metrics == {"actor/entropy": 1.75} and both.phase_seconds == {"optimizer": 2.0}
    assert combine([result(2.0)]) == result(2.0)


def test_an_empty_update_neither_spoils_nor_fails_a_step():
    empty = result(0.0, 0, num_tokens=0, is_applied=False, grad_norm=0.0, metrics={"actor/entropy": 0.0})
    for results in ([empty, result(2.0)], [result(2.0), empty]):
        whole = combine(results)
        assert (whole.loss, whole.grad_norm, whole.metrics) == (2.0, 1.0, {"actor/entropy": 1.0})
        assert whole.is_applied and not whole.is_empty
    assert combine([empty, empty]).is_empty and not combine([empty, empty]).is_fault


def test_a_step_is_a_fault_when_one_of_its_updates_is():
    whole = combine([result(2.0), result(float("nan"), is_applied=False, grad_norm=float("nan"))])
    assert whole.is_fault and np.isnan(whole.loss)
    skipped = combine([result(2.0), result(is_applied=False, is_overflow_expected=True)])
    assert not skipped.is_applied and not skipped.is_fault
