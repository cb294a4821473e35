"""Rules of reinforcement learning, and what each published method consists of."""

from __future__ import annotations

import re
from typing import Any

import pytest

from configs.plan.kv_cache import plan_cache
from configs.rules.check import check_config
from configs.sections.grpo import GrpoSection, PolicyMethod
from configs.stages import GrpoConfig

FIXED = {
    "model": {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 2, "vocab_size": 100},
    "data": {"tokenizer": "tokenizer"},
    "checkpoint": {"init_from": "runs/demo"},
}
TRAIN = {"num_steps": 9, "seq_len": 64, "global_batch_size": 16, "micro_batch_size": 2}


def problems_of(grpo: dict | None = None, rollout: dict | None = None, **train: Any) -> list[str]:
    needed = {"prompts": [{"path": "a.jsonl"}], "rewards": [{"function": "exact_match"}], "group_size": 4}
    rollout = {"max_new_tokens": 32} | (rollout or {})
    fields: dict[str, Any] = FIXED | {"grpo": needed | (grpo or {}), "rollout": rollout}
    config = GrpoConfig.model_validate(fields | {"train": TRAIN | train})
    return check_config(config, 1, platform="cpu", has_te=False)


@pytest.mark.parametrize("algorithm", ["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_pp"])
def test_every_algorithm_is_accepted_as_it_is(algorithm):
    assert problems_of({"algorithm": algorithm}) == []


@pytest.mark.parametrize(
    ("grpo", "rollout", "sentence"),
    [
        ({"group_size": 5}, {}, r"grpo\.group_size: 5 does not divide the 16 answers .* a value that would work: 4$"),
        ({"group_size": 24, "num_minibatches": 2}, {}, r"grpo\.group_size: 24 does not divide the 32 .* work: 16$"),
        ({}, {"stop_strings": ("",)}, r"rollout\.stop_strings: an empty text .* work: \[\]$"),
        ({"group_size": 1}, {}, r"grpo\.group_size: a group of one .*grpo\.advantage=group_std"),
        ({"algorithm": "dapo", "group_size": 1, "advantage": "batch"}, {}, r"grpo\.num_refills: a group of one"),
        ({"rewards": []}, {}, r"grpo\.rewards: .*exact_match"),
        ({"max_turns": 3}, {}, r"grpo\.max_turns: has no effect without grpo\.environment"),
        ({"kl": {"estimator": "k1"}}, {}, r"grpo\.kl\.estimator: k1 in the loss .* work: k2"),
        ({"algorithm": "cispo", "ratio": "sequence"}, {}, r"grpo\.ratio: .* work: token"),
        ({"clip_low": 1.0}, {}, r"grpo\.clip_low: .* work: 0\.2"),
        (
            {"algorithm": "rloo", "cut_answers": "leave_out"}, {},
            r"grpo\.cut_answers: leave_out .* a value that would work: train \(or grpo\.kl\.place=loss\)$",
        ),
        ({}, {"max_new_tokens": 64}, r"rollout\.max_new_tokens: 64 .*train\.seq_len=64; .* work: 32"),
        ({}, {"top_k": 101}, r"rollout\.top_k: 101 exceeds model\.vocab_size=100"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(grpo, rollout, sentence):
    (problem,) = problems_of(grpo, rollout)
    assert re.match(sentence, problem), problem


def test_a_cache_without_room_for_an_answer_is_refused_and_the_plan_tells_the_bytes():
    [problem] = problems_of(rollout={"cache_gib": 1e-6})
    assert re.search(r"rollout\.cache_gib: 1e-06 hold no answer of train\.seq_len=64 .* takes ([\d.e-]+) GiB", problem)
    assert problems_of(rollout={"cache_gib": 0.01}) == []
    fields: dict[str, Any] = FIXED | {"train": TRAIN, "rollout": {"max_rows": 8}, "precision": {"compute": "fp32"}}
    # 8 answers in slots of 128, and the spare place: keys and values of 2 heads of 4 numbers, 4 bytes each
    assert plan_cache(GrpoConfig.model_validate(fields)) == (8, (8 * 128 + 1) * 2 * 2 * 4 * 4)


def test_what_has_a_reason_is_allowed():
    assert problems_of({"algorithm": "reinforce_pp", "group_size": 1}) == []
    assert problems_of({"kl": {"estimator": "k1", "coefficient": 0.0}}) == []
    assert problems_of({"kl": {"estimator": "k1", "place": "reward"}}) == []
    assert problems_of({"cut_answers": "leave_out"}) == []
    assert problems_of({"rewards": [], "environment": "calculator", "max_turns": 3}) == []
    assert problems_of({"rewards": []}, num_steps=0) == []
    assert problems_of({}, {"max_new_tokens": 63}) == []


@pytest.mark.parametrize(
    ("train", "field"), [({"num_epochs": 2}, "num_epochs"), ({"patience": 2, "eval_every": 1}, "patience")]
)
def test_the_length_of_a_run_is_a_number_of_steps(train, field):
    assert any(problem.startswith(f"train.{field}: ") for problem in problems_of(**train))


# What the papers state; where one states no divergence there is none.
PUBLISHED = {
    # DeepSeekMath, section 4.1: (r - mean) / std, eq. 3: mean over answers of the mean over tokens; eq. 4: k3; 0.04.
    "grpo": ("group_std", "token", "clip", 0.2, 0.2, "sequence_mean", 0, (0.04, "k3", "loss")),
    # Understanding R1-Zero-Like Training, section 3: no std, a constant instead of the length, no divergence.
    "dr_grpo": ("group_mean", "token", "clip", 0.2, 0.2, "constant", 0, None),
    # DAPO, section 3 and 4.1: no divergence, 0.2 and 0.28, mean over tokens, dynamic sampling.
    "dapo": ("group_std", "token", "clip", 0.2, 0.28, "token_mean", 10, None),
    # GSPO, section 5.1: 3e-4 and 4e-4; eq. 5: mean over answers of ratios of answers.
    "gspo": ("group_std", "sequence", "clip", 3e-4, 4e-4, "sequence_mean", 0, None),
    # MiniMax-M1, section 3.1: mean over all tokens, no lower bound, no divergence.
    "cispo": ("group_std", "token", "cispo", 1.0, 4.0, "token_mean", 0, None),
    # Back to Basics: reward less the divergence of the whole answer, the others' mean as baseline, whole answers.
    "rloo": ("leave_one_out", "token", "clip", 0.2, 0.2, "sequence_sum", 0, (0.05, "k1", "reward")),
    # REINFORCE++: k1 of each token in the reward, advantages over the batch; with a baseline: k2 in the loss.
    "reinforce_pp": ("batch", "token", "clip", 0.2, 0.2, "token_mean", 0, (0.01, "k1", "reward")),
    "reinforce_pp_baseline": ("group_mean_batch", "token", "clip", 0.2, 0.2, "token_mean", 0, (0.01, "k2", "loss")),
}


@pytest.mark.parametrize("algorithm", PUBLISHED)
def test_an_algorithm_is_what_its_paper_says(algorithm):
    found = GrpoSection(algorithm=algorithm).method
    *fields, divergence = PUBLISHED[algorithm]
    names = ("advantage", "ratio", "surrogate", "clip_low", "clip_high", "normalisation", "num_refills")
    assert [getattr(found, name) for name in names] == fields
    if divergence is None:
        assert found.kl_coefficient == 0
    else:
        assert (found.kl_coefficient, found.kl_estimator, found.kl_place) == divergence
    assert (found.entropy_bonus, found.importance_cap) == (0, None)


def test_what_the_config_says_comes_before_the_algorithm():
    chosen = {
        "advantage": "leave_one_out", "ratio": "sequence", "clip_low": 0.1, "clip_high": 0.5,
        "normalisation": "constant", "num_refills": 0, "entropy_bonus": 0.01, "importance_cap": 2.0,
    }  # fmt: skip
    section = GrpoSection(algorithm="dapo", kl={"coefficient": 0.3, "estimator": "k2"}, **chosen)  # type: ignore[arg-type]
    expected = chosen | {"surrogate": "clip", "kl_coefficient": 0.3, "kl_estimator": "k2", "kl_place": "loss"}
    assert section.method == PolicyMethod(**expected)  # type: ignore[arg-type]
    assert GrpoSection(algorithm="dapo", num_refills=0).method.num_refills == 0
    assert GrpoSection(kl={"coefficient": 0.0}).method.kl_coefficient == 0  # type: ignore[arg-type]
