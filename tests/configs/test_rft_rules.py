"""Rules of rejection sampling."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.load import load_config
from configs.rules.check import check_config

RECIPE = str(Path(__file__).parents[2] / "configs" / "demo" / "rft.yaml")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["grpo.prompts=[]"], ["grpo.prompts"]),
        (["grpo.rewards=[]"], ["grpo.rewards"]),
        (["grpo.environment=calculator"], ["grpo.environment"]),
        (["grpo.prompts=[{path: a/x.jsonl}, {path: b/x.json}]"], ["grpo.prompts"]),
        (["grpo.prompts=[{path: x.jsonl, weight: 2}]"], ["grpo.prompts[0].weight"]),
        (["checkpoint.init_from=null"], ["checkpoint.init_from"]),
        (
            ["train.num_steps=5", "optimizer.lr=1e-4", "schedule.warmup_steps=2"],
            ["train.num_steps", "optimizer.lr", "schedule.warmup_steps"],
        ),
        (["train.num_epochs=2", "train.micro_batch_size=2"], ["train.num_epochs", "train.micro_batch_size"]),
        (["grpo.algorithm=dapo", "grpo.kl.coefficient=0"], ["grpo.algorithm", "grpo.kl.coefficient"]),
        (
            ["checkpoint.save_every=2", "sample.prompts=[x]", "log.tensorboard=false"],
            ["checkpoint.save_every", "sample.prompts", "log.tensorboard"],
        ),
        (
            ["train.recompute.granularity=full", "data.prefetch_steps=3"],
            ["train.recompute.granularity", "data.prefetch_steps"],
        ),
        (["lora={rank: 8}"], ["lora"]),
        (["rollout.max_new_tokens=256"], ["rollout.max_new_tokens"]),
        (["grpo.group_size=3"], ["grpo.group_size"]),
        (["grpo.group_size=1", "rft.max_per_prompt=null", "rft.num_prompts=null"], []),
    ],
)
def test_what_it_needs_and_what_means_nothing_to_it(words: list[str], named: list[str]) -> None:
    problems = check_config(load_config(RECIPE, words, "rft"), 2, platform="cpu", has_te=False)
    assert [one.split(": ")[0] for one in problems] == named, problems
    assert all("a value that would work" in one or "others" in one for one in problems)
