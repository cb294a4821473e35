"""PPO from end to end: what it reports, and a run that is killed and goes on to the same curve on another layout."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

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
        world: int,
        name: str,
        *overrides: str,
        fault: str | None = None,
        refused: str | None = None,
        code: ExitCode = ExitCode.BAD_INPUT,
    ) -> list[dict[str, Any]]:
        run_dir = tmp_path / name
        words = (*fixed, f"run.dir={run_dir}", *overrides)
        if refused is not None:
            ended, said = train(world, *words, stage="ppo")
            assert ended == code and "\n" not in said and re.search(refused, said), said
            return []
        if fault is None:
            assert train(world, *words, stage="ppo") == (ExitCode.DONE, "")
        else:
            with pytest.raises(RankFailed, match="exit code -9"):
                train(world, *words, stage="ppo", fault=fault)
        return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]

    run.fixed = fixed  # type: ignore[attr-defined]
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


def read_critic(run_dir: Path) -> dict[str, torch.Tensor]:
    """Return the weights of the critic in a run's last checkpoint, as torch reads it."""
    reader = dcp.FileSystemReader(run_dir / "checkpoints" / "latest")
    entries = reader.read_metadata().state_dict_metadata.items()
    state = {
        key: torch.zeros(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries
        if key.startswith("critic.") and "optimizer" not in key and isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def test_a_second_run_goes_on_with_the_critic_of_the_first(ppo, tmp_path):
    """Named or not, on another layout, and not with the policy's weights, which it began with."""
    ppo(2, "first", "parallel.tp=2", "train.num_steps=2")
    trained = read_critic(tmp_path / "first")
    assert "critic.output_layer.weight" in trained and len(trained) > 4
    for name, word in (
        ("named", f"ppo.critic.init_from={tmp_path / 'first'}"),
        ("unnamed", "ppo.critic.warmup_steps=0"),
    ):
        start = f"checkpoint.init_from={tmp_path / 'first'}"
        ppo(1, name, start, word, "train.num_steps=2", "ppo.critic.optimizer.lr=1e-12", "ppo.critic.optimizer.min_lr=0")
        again = read_critic(tmp_path / name)
        assert again.keys() == trained.keys()
        for key, tensor in trained.items():
            torch.testing.assert_close(again[key], tensor, rtol=0, atol=1e-9)
    told = (tmp_path / "named" / "logs" / "attempt_1" / "rank_0.log").read_text()
    assert "trained from the critic in" in told
    assert re.search(r"step 1/2 .* critic loss \d", told) and re.search(r"step 2/2 .*\d  loss -?\d", told)


def test_a_critic_that_is_not_finite_is_named(ppo):
    broken = ("ppo.critic.optimizer.lr=1e30", "ppo.critic.warmup_steps=0", "train.max_nonfinite_steps=1")
    ppo(1, "broken", *broken, refused="critic: non-finite .*lower ppo.critic.optimizer.lr", code=ExitCode.NON_FINITE)


def score_by_transformers(export: Path, texts: list[tuple[str, str]]) -> list[float]:
    """Return the scores of conversations of a prompt and an answer, tokenised apart as they were seen and drawn."""
    import torch
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(export, dtype=torch.float64).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    found = []
    for prompt, answer in texts:
        ids = [token for text in (prompt, answer + "<|im_end|>") for token in tokenizer(text)["input_ids"]]
        with torch.no_grad():
            found.append(float(model(torch.tensor([ids])).logits[0, 0]))
    return found


def test_four_models_by_turns_and_a_reward_model_that_scores_as_transformers_does(ppo, train, questions, tmp_path):
    pairs, seed, reward = tmp_path / "pairs.jsonl", tmp_path / "seed", tmp_path / "reward"
    rows = [{"prompt": f"{n}?", "chosen": f"is {n}", "rejected": f"no {n}"} for n in range(12)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = f"data.tokenizer={questions / 'tokenizer'}"
    given = (
        *NO_DATA, tokenizer, f"checkpoint.init_from={seed}", f"run.dir={reward}", f"reward.train=[{{path: {pairs}}}]",
        f"reward.cache={tmp_path / 'cache'}", "reward.template=chatml", "train.num_steps=3", "optimizer.lr=1e-2",
        "checkpoint.export_hf=true", "train.global_batch_size=4", "train.seq_len=64",
    )  # fmt: skip
    assert train(1, *given, stage="reward") == (ExitCode.DONE, "")
    scored = f"grpo.reward_model={{init_from: {reward}, weight: 0.5}}"
    first = ("train.num_steps=1", "ppo.critic.warmup_steps=0", scored)
    four = (*first, "parallel.tp=2", "parallel.pp=2", f"ppo.critic.init_from={reward}", "train.num_steps=2")
    row, _ = rows = ppo(4, "scored", *four)
    by_turns = ppo(4, "by_turns", *four, "parallel.offload_models=true")
    assert [without_times(one) for one in by_turns] == [without_times(one) for one in rows]
    kept = rollouts_of(tmp_path / "scored")[1]
    values = [one["rewards"]["reward_model"] for one in kept]
    for one, value in zip(kept, values, strict=True):
        assert one["score"] == pytest.approx(one["rewards"]["regex"] + 0.5 * value)
    assert row["reward/reward_model/mean"] == pytest.approx(np.mean(values)) and np.std(values) > 0.01
    assert math.isfinite(rows[-1]["validation_reward_model/questions"])
    # read whole, an answer that begins with a space has other tokens, and one that spells a chat token is no turn's end
    told = [
        (one, value)
        for one, value in zip(kept, values, strict=True)
        if not one["answers"][0][:1].isspace() and "<|" not in one["answers"][0]
    ]
    export = reward / "checkpoints" / "step_00000003" / "hf"
    expected = score_by_transformers(export, [(one["prompt"], one["answers"][0]) for one, _ in told])
    assert len(told) > 8
    np.testing.assert_allclose([value for _, value in told], expected, rtol=0, atol=1e-4)
    words = [word for word in (*ppo.fixed, *first, "grpo.group_size=4") if not word.startswith("ppo.")]
    assert train(2, *words, f"run.dir={tmp_path / 'grpo'}", stage="grpo") == (ExitCode.DONE, "")
    again = rollouts_of(tmp_path / "grpo")[1]
    pairs_of_same = [
        (value, other["rewards"]["reward_model"])
        for one, value in zip(kept, values, strict=True)
        for other in again
        if (one["prompt"], one["answers"]) == (other["prompt"], other["answers"])
    ]
    assert pairs_of_same
    np.testing.assert_allclose(*zip(*pairs_of_same, strict=True), rtol=0, atol=1e-5)
    ppo(2, "odd", f"grpo.reward_model={{init_from: {seed}}}", refused=r"^grpo\.reward_model\.init_from: ")
    ppo(2, "odd", "grpo.reward_model={init_from: nowhere}", refused=r"^grpo\.reward_model\.init_from: nowhere holds no")
