"""Rules of online DPO."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.load import load_config
from configs.rules.check import check_config

RECIPE = str(Path(__file__).parents[2] / "configs" / "demo" / "online_dpo.yaml")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], []),
        (["grpo.algorithm=dapo", "grpo.num_minibatches=2"], ["grpo.algorithm", "grpo.num_minibatches"]),
        (["grpo.kl.coefficient=0.1", "grpo.gate_tolerance=1"], ["grpo.gate_tolerance", "grpo.kl.coefficient"]),
        (["grpo.group_size=1"], ["grpo.group_size"]),
        (["grpo.group_size=3"], []),
        (["rollout.max_new_tokens=129"], ["rollout.max_new_tokens"]),
        (["online_dpo.length_penalty=0.1"], ["online_dpo.length_penalty"]),
        (["online_dpo.loss=simpo", "online_dpo.reference=round"], ["online_dpo.reference"]),
        (["online_dpo.loss=orpo", "online_dpo.reference=start"], ["online_dpo.sft_weight"]),
        (["lora={rank: 8, init_from: adapter}"], []),
        (["lora={rank: 8, init_from: adapter}", "online_dpo.reference=start"], ["online_dpo.reference"]),
        (["grpo.rewards=[]"], ["grpo.rewards"]),
        (["train.num_epochs=1"], ["train.num_epochs"]),
    ],
)
def test_what_it_needs_and_what_means_nothing_to_it(words: list[str], named: list[str]) -> None:
    problems = check_config(load_config(RECIPE, words, "online_dpo"), 2, platform="cpu", has_te=False)
    assert [one.split(": ")[0] for one in problems] == named, problems
    assert all("that would work: " in one for one in problems)


def test_single_answers_are_refused() -> None:
    with pytest.raises(Exception, match="online_dpo.loss"):
        load_config(RECIPE, ["online_dpo.loss=kto"], "online_dpo")
