"""Rules of PPO: what its stage needs, and fields that cannot act."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from configs.load import load_config
from configs.rules.check import check_config

DEMO = Path(__file__).parents[2] / "configs" / "demo"


def problems_of(stage: str, *words: str) -> list[str]:
    return check_config(load_config(str(DEMO / f"{stage}.yaml"), words, stage), 2, platform="cpu", has_te=False)


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("grpo.algorithm=rloo", r"grpo\.algorithm: rloo has no critic; .* work: ppo \(or rloo with launch/grpo\.py\)$"),
        ("grpo.advantage=group_std", r"grpo\.advantage: has no effect with ppo"),
        ("ppo.adaptive_kl={target: 3}", r"ppo\.adaptive_kl: there is no divergence in the rewards .* work: null"),
        ("ppo.critic.warmup_steps=50", r"ppo\.critic\.warmup_steps: .* train\.num_steps=50; .* work: 5$"),
        ("ppo.critic.optimizer.lr=1e-6", r"ppo\.critic\.optimizer\.min_lr: 2e-05 exceeds ppo\.critic\.optimizer\.lr"),
        ("ppo.critic.optimizer.beta2=1", r"ppo\.critic\.optimizer\.beta2: 1\.0 never forgets .* work: 0\.95$"),
        (
            "ppo.adaptive_kl={horizon: 6}",
            r"ppo\.adaptive_kl\.horizon: in 6 answers .* with the 256 answers of one step; .* work: 2560$",
        ),
        ("grpo.rewards=[]", r"grpo\.rewards: answers need at least one"),
    ],
)
def test_what_cannot_be_is_refused(word, sentence):
    (problem,) = problems_of("ppo", word, *(["grpo.kl.place=loss", "grpo.kl.estimator=k3"] if "target" in word else []))
    assert re.match(sentence, problem), problem


def test_a_lambda_by_length_leaves_none_to_set():
    assert problems_of("ppo", "ppo.length_alpha=0.05") == []
    (problem,) = problems_of("ppo", "ppo.length_alpha=0.05", "ppo.gae_lambda=0.9")
    assert problem.startswith("ppo.gae_lambda: has no effect with ppo.length_alpha")


def test_ppo_is_the_algorithm_of_its_stage_alone():
    (problem,) = problems_of("grpo", "grpo.algorithm=ppo")
    assert problem.startswith("grpo.algorithm: ppo has a critic, which launch/ppo.py trains")
    method = load_config(str(DEMO / "ppo.yaml"), [], "ppo").grpo.method  # type: ignore[attr-defined]
    assert (method.kl_place, method.kl_estimator, method.normalisation, method.ratio) == (
        "reward", "k1", "token_mean", "token",
    )  # fmt: skip


@pytest.mark.parametrize("stage", ["grpo", "ppo", "rft"])
def test_a_reward_model_may_be_the_only_reward(stage):
    assert problems_of(stage, "grpo.rewards=[]", "grpo.reward_model={init_from: runs/reward, weight: 2}") == []
