"""Online DPO from end to end: rounds of answers, their pairs, and a run that is killed wherever it may be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.end_to_end.conftest import write_text
from tests.pool import RankFailed
from tools.train_tokenizer import train_tokenizer

NO_DATA = ("data.train=[]", "data.validation=[]", "model.vocab_size=320", "train.seq_len=64")
TOLD = (
    "loss", "grad_norm", "rewards/margins", "critic/score/mean", "pairs/num_pairs",
    "pairs/num_ties", "pairs/score_margin", "validation_score/questions",
)  # fmt: skip


@pytest.fixture
def online(train, tmp_path):
    """Return a function that learns from the policy's own answers: `online(world, name, *overrides) -> rows`."""
    special = ("<|im_start|>", "<|im_end|>")
    tokenizer = f"data.tokenizer={tmp_path / 'tokenizer'}"
    text = write_text(tmp_path / "text.jsonl", 0, 300)
    train_tokenizer([text], str(tmp_path / "tokenizer"), 320, special_tokens=special)
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps({"prompt": f"{number}?"}) + "\n" for number in range(12)))
    seed, source = tmp_path / "seed", f"[{{path: {questions}}}]"
    assert train(1, *NO_DATA, tokenizer, f"run.dir={seed}", "train.num_steps=0") == (0, "")
    fixed = (
        *NO_DATA, tokenizer, f"checkpoint.init_from={seed}", "checkpoint.save_every=1", "train.num_steps=5",
        "train.eval_num_samples=256", "train.global_batch_size=4", "optimizer.lr=1e-3", "grpo.template=chatml",
        f"grpo.prompts={source}", f"grpo.validation={source}", "grpo.num_validation_prompts=3", "grpo.group_size=4",
        "grpo.rewards=[{function: regex, options: {pattern: '[aeo][^e]*r'}}, {function: length, options: {buffer: 8}}]",
        "grpo.num_reward_workers=1",
        "rollout.max_new_tokens=12", "online_dpo.prompts_per_round=6", "online_dpo.steps_per_round=2",
    )  # fmt: skip

    def run(
        world: int, name: str, *overrides: str, fault: str | None = None, refused: str | None = None
    ) -> list[dict[str, Any]]:
        run_dir = tmp_path / name
        words = (*fixed, f"run.dir={run_dir}", *overrides)
        if refused is not None:
            code, said = train(world, *words, stage="online_dpo")
            assert code == 2 and said.startswith(refused) and "\n" not in said, said
        elif fault is None:
            assert train(world, *words, stage="online_dpo") == (0, "")
        else:
            with pytest.raises(RankFailed, match="exit code -9"):
                train(world, *words, stage="online_dpo", fault=fault)
        metrics = run_dir / "metrics.jsonl"
        return [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []

    return run


def check_round(path: Path, row: dict[str, Any]) -> None:
    """Require that of every group the best answer is chosen and the worst rejected, and that ties are counted."""
    answers, num_pairs = [json.loads(line) for line in path.read_text().splitlines()], 0
    assert len(answers) == 24
    for number in range(6):
        group = [one for one in answers if one["group"] == number]
        scores = [one["score"] for one in group]
        sides = {one["side"]: one["score"] for one in group if one["side"] is not None}
        assert sides == ({"chosen": max(scores), "rejected": min(scores)} if max(scores) > min(scores) else {})
        num_pairs += bool(sides)
    assert (row["pairs/num_pairs"], row["pairs/num_ties"], row["pairs/num_short"]) == (num_pairs, 6 - num_pairs, 0)
    assert num_pairs > 1


@pytest.mark.parametrize("reference", ["start", "round"])
def test_a_run_goes_on_after_kills_within_rounds_and_on_another_layout(online, tmp_path, reference):
    given = f"online_dpo.reference={reference}"
    rows = online(1, "whole", given)
    begun = [row["step"] for row in rows if "pairs/num_pairs" in row]
    assert begun == [1, 3, 5] and rows[0]["loss"] == pytest.approx(np.log(2), rel=1e-4)
    at_reference = [abs(row["rewards/margins"]) < 1e-4 for row in rows]
    assert at_reference == [True, False, reference == "round", False, reference == "round"]
    for step in begun:
        check_round(tmp_path / "whole" / "rollouts" / f"step_{step:08d}.jsonl", rows[step - 1])
    faults = ("killed_drawing_answers", "killed_in_second_scores", "killed_in_second_update")
    for fault in faults if reference == "start" else ():
        online(2, "parts", given, fault=fault)  # in the first round, at the second's scores, then in step 4
    if reference == "round":
        online(2, "parts", given, fault="killed_in_second_update")
    parts = online(2, "parts", given, "parallel.pp=2")
    for name in TOLD:
        found, expected = ([row.get(name, 0.0) for row in some] for some in (parts, rows))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_reward_model_ranks_the_answers_and_simpo_needs_no_reference(online, train, tmp_path):
    judge = tmp_path / "judge"
    options = (f"data.tokenizer={tmp_path / 'tokenizer'}", f"checkpoint.init_from={tmp_path / 'seed'}")
    made = (f"run.dir={judge}", "train.num_steps=0", "reward.template=chatml")
    assert train(1, *NO_DATA, *options, *made, stage="reward") == (0, "")
    scored = ("grpo.rewards=[]", f"grpo.reward_model={{init_from: {judge}}}")
    rows = online(2, "free", "online_dpo.loss=simpo", "train.num_steps=2", "parallel.tp=2", *scored)
    assert len(rows) == 2 and rows[0]["reward/reward_model/mean"] == pytest.approx(rows[0]["critic/score/mean"])
    check_round(tmp_path / "free" / "rollouts" / "step_00000001.jsonl", rows[0])
    assert rows[0]["pairs/num_pairs"] == 6, "values hardly ever tie"


def test_answers_of_one_score_teach_nothing_and_end_the_run_in_a_sentence(online):
    alike = "grpo.rewards=[{function: regex, options: {pattern: '~~~~'}}]"
    refused = "grpo.rewards: 10 groups of answers in a row, those of step 1, are each of one score"
    online(1, "alike", alike, "online_dpo.prompts_per_round=1", "grpo.group_size=2", refused=refused)
