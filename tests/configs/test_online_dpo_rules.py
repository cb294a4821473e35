"""Rules of online DPO."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.load import load_config
from configs.plan.derive import derive_layout
from configs.plan.show import describe
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
        (["lora={rank: 8, init_from: adapter}", "online_dpo.reference=start"], []),
        (["grpo.rewards=[]"], ["grpo.rewards"]),
        (["train.num_epochs=1"], ["train.num_epochs"]),
    ],
)
def test_what_it_needs_and_what_means_nothing_to_it(words: list[str], named: list[str]) -> None:
    problems = check_config(load_config(RECIPE, words, "online_dpo"), 2, platform="cpu", has_te=False)
    assert [one.split(": ")[0] for one in problems] == named, problems
    assert all("that would work: " in one for one in problems)


def test_a_plan_says_what_a_round_is() -> None:
    text = describe(config := load_config(RECIPE, [], "online_dpo"), derive_layout(config, 2))
    assert "1,024 prompts x 8 answers, a pair of each group; then 50 steps" in text
    assert "the policy as each round begins" in text and "of the host's memory" not in text
    config = load_config(RECIPE, ["online_dpo.reference=start"], "online_dpo")
    assert "of the host's memory" in describe(config, derive_layout(config, 2))


def test_single_answers_are_refused() -> None:
    with pytest.raises(Exception, match="online_dpo.loss"):
        load_config(RECIPE, ["online_dpo.loss=kto"], "online_dpo")
