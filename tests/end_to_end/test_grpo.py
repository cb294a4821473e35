"""Reinforcement learning from end to end: rollouts, scores, metrics, and a run that is killed wherever it may be."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from configs.errors import ExitCode
from tests.pool import RankFailed

NUM_STEPS = 4
NO_DATA = ("data.train=[]", "data.validation=[]", "model.vocab_size=320")
FIGURES = (
    "actor/entropy", "actor/kl", "actor/clip_frac", "actor/pg_loss", "actor/ppo_kl", "critic/score/mean",
    "critic/rewards/mean", "critic/advantages/mean", "response_length/mean", "prompt_length/mean",
    "reward/regex/mean", "reward/length/mean", "rollout/logprob_difference", "rollout/num_equal_groups",
    "rollout/idle_share/dp_0", "rollout/idle_share/dp_1", "timing_s/generate_sequences", "timing_s/reward",
    "timing_s/update_actor", "timing_s/step", "perf/generated_tokens_per_second",
)  # fmt: skip


@pytest.fixture
def grpo(questions, train, tmp_path):
    """Return a function that reinforces seed weights: `grpo(world, name, *overrides) -> rows of metrics`.

    With a `fault`, which kills the ranks if `is_killed`, or a sentence by which the run must be `refused` with an exit
    `code`.
    """
    seed = tmp_path / "seed"
    tokenizer = f"data.tokenizer={questions / 'tokenizer'}"
    assert train(1, *NO_DATA, tokenizer, f"run.dir={seed}", "train.num_steps=0") == (ExitCode.DONE, "")
    source = f"{{path: {questions / 'questions.jsonl'}}}"
    fixed = (
        *NO_DATA, tokenizer, f"checkpoint.init_from={seed}", "checkpoint.save_every=1", "train.seq_len=64",
        "train.eval_num_samples=256",
        f"train.num_steps={NUM_STEPS}", "train.global_batch_size=8", "optimizer.lr=1e-3", "grpo.template=chatml",
        f"grpo.prompts=[{source}]", f"grpo.validation=[{source}]", "grpo.num_validation_prompts=3", "grpo.group_size=4",
        "grpo.rewards=[{function: regex, options: {pattern: '[aeo]'}}, {function: length, options: {buffer: 8}}]",
        "grpo.num_minibatches=2", "grpo.num_reward_workers=1", "rollout.max_new_tokens=12",
    )  # fmt: skip

    def run(
        world: int,
        name: str,
        *overrides: str,
        fault: str | None = None,
        is_killed: bool = True,
        refused: str | None = None,
        code: ExitCode = ExitCode.BAD_INPUT,
    ) -> list[dict[str, Any]]:
        run_dir = tmp_path / name
        if refused is not None:
            ended, said = train(world, *fixed, f"run.dir={run_dir}", *overrides, stage="grpo")
            assert ended == code and "\n" not in said and re.search(refused, said), said
        elif fault is None or not is_killed:
            done = train(world, *fixed, f"run.dir={run_dir}", *overrides, stage="grpo", fault=fault)
            assert done == (ExitCode.DONE, "")
        else:
            with pytest.raises(RankFailed, match="exit code -9"):
                train(world, *fixed, f"run.dir={run_dir}", *overrides, stage="grpo", fault=fault)
        return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]

    return run


def rollouts_of(run_dir: Path) -> dict[int, list[dict[str, Any]]]:
    """Return what is kept of each step's rollouts."""
    files = sorted((run_dir / "rollouts").glob("step_*.jsonl"))
    return {
        int(path.stem.removeprefix("step_")): [json.loads(line) for line in path.read_text().splitlines()]
        for path in files
    }


def check_rollouts(kept: dict[int, list[dict[str, Any]]], rows: list[dict[str, Any]]) -> None:
    """Require that what is kept is whole, and that the metrics are those of what is kept."""
    assert sorted(kept) == list(range(1, NUM_STEPS + 1)) == [row["step"] for row in rows]
    for step, rollouts in kept.items():
        row = rows[step - 1]
        assert len(rollouts) == 16 and {one["sample"] for one in rollouts} == {0, 1, 2, 3}
        assert len({one["group"] for one in rollouts}) == len({one["row"] for one in rollouts}) == 4
        for one in rollouts:
            assert one["step"] == step and one["source"] == "questions" and one["faults"] == {}
            number = one["row"]
            assert one["prompt"] == (f"<|im_start|>user\n{number} + {number}?<|im_end|>\n<|im_start|>assistant\n")
            regex, length = one["rewards"]["regex"], one["rewards"]["length"]
            assert one["score"] == pytest.approx(regex + length)
            assert regex == float(any(letter in one["answers"][0] for letter in "aeo"))
            assert length == pytest.approx(-max(one["num_sampled_tokens"] - 4, 0) / 8)
        for group in range(4):
            assert sum(one["advantage"] for one in rollouts if one["group"] == group) == pytest.approx(0, abs=1e-9)
        scores = [one["score"] for one in rollouts]
        assert row["critic/score/mean"] == pytest.approx(sum(scores) / 16)
        assert row["response_length/mean"] == pytest.approx(sum(one["num_sampled_tokens"] for one in rollouts) / 16)


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    """Return what of a line must be the same in every run."""
    told = ("loss", "grad_norm", "num_tokens", "lr", "step")
    parts = ("actor/", "critic/", "reward/", "response_length/")
    return {name: value for name, value in row.items() if name in told or name.startswith(parts)}


def test_a_run_reports_keeps_and_goes_on_after_kills(grpo, tmp_path):
    rows = grpo(2, "whole")
    for row in rows:
        missing = [name for name in FIGURES if not math.isfinite(row.get(name, math.nan))]
        assert not missing, missing
        assert row["rollout/logprob_difference"] < 1e-2 and row["loss"] != 0
    assert rows[0]["rollout/logprob_difference"] < 1e-4, "the same weights"
    assert "validation_score/questions" in rows[-1]
    whole = rollouts_of(tmp_path / "whole")
    check_rollouts(whole, rows)
    assert any(one["advantage"] != 0 for one in whole[1]), "nothing to learn"
    for fault in ("killed_while_generating", "killed_while_scoring", "killed_in_the_update"):
        grpo(2, "killed", fault=fault)
    again = grpo(2, "killed")
    assert [without_times(row) for row in again] == [without_times(row) for row in rows]
    assert rollouts_of(tmp_path / "killed") == whole


def test_an_environment_answers_and_its_words_are_not_trained(grpo, tmp_path):
    environment = "tests.trainer.environments.odd_environment:Odd"
    fixed = (
        f"grpo.environment={environment}", "grpo.max_turns=2", "grpo.rewards=[]", "train.num_steps=1",
        "rollout.max_new_tokens=5", "rollout.stop_strings=[a,e,i,o,n,r,s,t,l,d]", "grpo.num_minibatches=1",
        "train.global_batch_size=16",
    )  # fmt: skip
    (row,), (other,) = (grpo(2, name, *fixed, f"parallel.tp={tp}") for name, tp in (("dp2", 1), ("tp2", 2)))
    kept = rollouts_of(tmp_path / "dp2")[1]
    assert kept == rollouts_of(tmp_path / "tp2")[1] and max(len(one["answers"]) for one in kept) == 2
    for one in kept:
        answer = 2 * one["row"]
        assert one["observations"] == [
            f"<|im_end|>\n<|im_start|>user\n{answer}, {1 + 2 * turn}<|im_end|>\n<|im_start|>assistant\n"
            for turn in range(len(one["answers"]) - 1)
        ]
        assert one["score"] == one["rewards"]["environment"] == len(one["answers"])
    assert row["num_tokens"] == sum(one["num_sampled_tokens"] for one in kept), "what it says is trained"
    assert row["rollout/logprob_difference"] < 1e-4 and row["loss"] == pytest.approx(other["loss"], rel=1e-5, abs=1e-6)


def test_rewards_that_fail_for_every_answer_are_told_and_leave_the_run_alone(grpo, tmp_path):
    odd = "grpo.rewards=[{function: 'tests.trainer.environments.odd_rewards:has_no_return'}]"
    (row,) = grpo(1, "failing", odd, "grpo.num_minibatches=1", "train.num_steps=1")
    assert row["reward/num_failed"] == 8 and row["loss"] == row["num_tokens"] == 0
    (log,) = (tmp_path / "failing" / "logs").rglob("rank*0.log")
    said = (
        "8 of 8 answers have no score (no reward applies to them: all return None); nothing can be learnt: grpo.rewards"
    )
    assert said in log.read_text()


def test_rewards_beyond_all_measure_are_named(grpo, tmp_path):
    huge = "grpo.rewards=[{function: regex, options: {pattern: '[aeo]'}, weight: 1e36}]"
    fixed = ("grpo.algorithm=dr_grpo", "train.max_nonfinite_steps=1", "train.num_steps=1")
    grpo(1, "huge", huge, *fixed, refused="lower the weights of grpo.rewards", code=ExitCode.NON_FINITE)


def test_layouts_give_the_same_rollouts(grpo, tmp_path):
    fixed = ("train.num_steps=2", "grpo.num_minibatches=1", "train.global_batch_size=16", "grpo.algorithm=dr_grpo")
    one = grpo(2, "dp2", *fixed)
    two = grpo(2, "tp2", *fixed, "parallel.tp=2", "parallel.sp=true")
    assert rollouts_of(tmp_path / "dp2") == rollouts_of(tmp_path / "tp2")
    for row, other in zip(one, two, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5, abs=1e-6)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    assert "actor/kl" not in one[0], "there is no reference"
    # A reference is where a run began, which a checkpoint without one cannot tell.
    grpo(2, "dp2", *fixed, "train.num_steps=3", "grpo.kl.coefficient=0.1", refused=r"^grpo\.kl\.coefficient: .* 0")
    more = grpo(2, "dp2", *fixed, "train.num_steps=3")
    assert [row["step"] for row in more] == [1, 2, 3]


def test_a_replica_whose_answers_take_longer_than_the_time_limit_is_waited_for(grpo):
    """The other replica waits in the control group for twice `parallel.timeout_seconds`: the watch ends no such run."""
    options = ("parallel.tp=2", "parallel.timeout_seconds=4", "train.num_steps=1", "grpo.validation=[]")
    assert grpo(4, "patient", *options, fault="long_answers", is_killed=False)[0]["step"] == 1
