"""PPO from end to end: what it reports, and a run that is killed and goes on to the same curve on another layout."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest

from configs.errors import ExitCode
from tests.end_to_end.test_grpo import NO_DATA, rollouts_of, without_times
from tests.pool import RankFailed

NUM_STEPS = 4
FIGURES = (
    "critic/vf_loss", "critic/vf_clipfrac", "critic/vf_explained_var", "critic/vpred_mean", "critic/grad_norm",
    "critic/values/mean", "critic/returns/mean", "critic/advantages/mean", "critic/rewards/mean", "critic/score/mean",
    "reward/regex/mean", "timing_s/update_critic", "timing_s/update_actor",
)  # fmt: skip
OF_THE_POLICY = ("actor/pg_loss", "actor/kl", "objective/kl", "actor/reward_kl_penalty_coeff", "actor/clip_frac")


@pytest.fixture
def ppo(questions, train, tmp_path):
    """Return a function that trains seed weights: `ppo(world, name, *overrides) -> rows of metrics`.

    With a `fault` that kills the ranks, or a sentence by which the run must be `refused`.
    """
    seed = tmp_path / "seed"
    tokenizer = f"data.tokenizer={questions / 'tokenizer'}"
    assert train(1, *NO_DATA, tokenizer, f"run.dir={seed}", "train.num_steps=0") == (ExitCode.DONE, "")
    source = f"{{path: {questions / 'questions.jsonl'}}}"
    fixed = (
        *NO_DATA, tokenizer, f"checkpoint.init_from={seed}", "checkpoint.save_every=1", "train.seq_len=64",
        "train.eval_num_samples=256", f"train.num_steps={NUM_STEPS}", "train.global_batch_size=8", "optimizer.lr=1e-3",
        "grpo.template=chatml", f"grpo.prompts=[{source}]", f"grpo.validation=[{source}]",
        "grpo.num_validation_prompts=3", "grpo.group_size=1", "grpo.num_minibatches=2", "grpo.num_reward_workers=1",
        "grpo.rewards=[{function: regex, options: {pattern: '[aeo]'}}]", "rollout.max_new_tokens=12",
        "ppo.critic.optimizer.lr=2e-3", "ppo.critic.warmup_steps=1", "ppo.adaptive_kl={target: 0.01, horizon: 100}",
    )  # fmt: skip

    def run(
        world: int, name: str, *overrides: str, fault: str | None = None, refused: str | None = None
    ) -> list[dict[str, Any]]:
        run_dir = tmp_path / name
        words = (*fixed, f"run.dir={run_dir}", *overrides)
        if refused is not None:
            code, said = train(world, *words, stage="ppo")
            assert code == ExitCode.BAD_INPUT and "\n" not in said and re.search(refused, said), said
            return []
        if fault is None:
            assert train(world, *words, stage="ppo") == (ExitCode.DONE, "")
        else:
            with pytest.raises(RankFailed, match="exit code -9"):
                train(world, *words, stage="ppo", fault=fault)
        return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]

    return run


def test_a_killed_run_goes_on_to_the_same_curve_on_another_layout(ppo, tmp_path):
    rows = ppo(2, "whole")
    for step, row in enumerate(rows, start=1):
        told = FIGURES if step == 1 else (*FIGURES, *OF_THE_POLICY)
        assert all(math.isfinite(row.get(name, math.nan)) for name in told), row
        assert ("actor/pg_loss" in row) == (step > 1), "the critic alone learns at first"
    assert rows[1]["actor/reward_kl_penalty_coeff"] == 0.05 != rows[3]["actor/reward_kl_penalty_coeff"]
    whole = rollouts_of(tmp_path / "whole")
    ppo(2, "killed", fault="killed_while_scoring")
    ppo(2, "killed", "parallel.tp=2", fault="killed_in_the_update")
    again = ppo(2, "killed", "parallel.pp=2")
    assert rollouts_of(tmp_path / "killed").keys() == whole.keys()
    for row, other in zip(again, rows, strict=True):
        for name, value in without_times(other).items():
            assert row[name] == pytest.approx(value, rel=1e-3, abs=2e-4), (other["step"], name)
    for step, rollouts in whole.items():
        kept = rollouts_of(tmp_path / "killed")[step]
        assert [one["answers"] for one in kept] == [one["answers"] for one in rollouts]
