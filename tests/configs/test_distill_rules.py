"""Rules of distillation."""

from __future__ import annotations

from typing import Any

import pytest

from configs.rules.check import check_config
from configs.stages import STAGE_CONFIGS
from tests.small_runs import DENSE_MODEL

CHATS = [{"path": "data/chats.jsonl"}]


def problems_of(stage: str = "distill", **sections: Any) -> list[str]:
    """Return what is wrong with a valid config that has these sections."""
    is_cache = stage == "teacher_cache"
    distill = {"cache": "data/teacher_cache", "top_k": 16} if is_cache else {"teacher": "runs/chat"}
    config = STAGE_CONFIGS[stage].model_validate(
        {
            "model": DENSE_MODEL,
            "data": sections.pop("data", {"tokenizer": "data/tokenizer"}),
            "train": {"num_steps": 0 if is_cache else 5, "seq_len": 32},
            "precision": {"compute": "fp32"},
            "schedule": {} if is_cache else {"kind": "constant"},
            "checkpoint": {"init_from": "runs/chat"} if is_cache else {},
            "sft": {"template": "chatml", "train": CHATS, "validation": CHATS} | sections.pop("sft", {}),
            "distill": distill | sections.pop("distill", {}),
            **sections,
        }
    )
    return check_config(config, 1, platform="cpu", has_te=False)


CASES: list[tuple[str, dict[str, Any], str]] = [
    ("distill", {"distill": {"teacher": None}}, "distill.teacher: there is none to learn from"),
    ("distill", {"distill": {"top_k": 251}}, "distill.top_k: 251 exceeds model.vocab_size=250; a value that would"),
    ("distill", {"distill": {"cache": "a"}}, "distill.teacher: has no effect with distill.cache"),
    ("distill", {"distill": {"teacher": None, "cache": "a", "top_k": 3}}, "distill.top_k: has no effect with"),
    ("distill", {"rollout": {"temperature": 2.0}}, "rollout.temperature: has no effect"),
    ("distill", {"distill": {"lmbda": 0.5}}, "rollout.max_new_tokens: 512 leaves no room for a prompt"),
    ("distill", {"sft": {"label_smoothing": 0.1}}, "sft.label_smoothing: has no effect in distillation"),
    ("teacher_cache", {"distill": {"top_k": None}}, "distill.top_k: a cache holds so many ids of each token"),
    ("teacher_cache", {"distill": {"cache": None}}, "distill.cache: says where to write"),
    ("teacher_cache", {"distill": {"beta": 0.5}}, "distill.beta: has no effect in launch/teacher_cache.py"),
    ("teacher_cache", {"checkpoint": {}}, "checkpoint.init_from: a cache is made of what is said by a trained model"),
]


@pytest.mark.parametrize(("stage", "sections", "words"), CASES)
def test_what_cannot_be_is_refused_in_one_sentence(stage, sections, words):
    (problem,) = problems_of(stage, **sections)
    assert problem.startswith(words) and "that would work: " in problem


def test_text_has_no_prompts_and_a_cache_knows_whole_documents():
    text, data = {"template": None, "train": [], "validation": []}, {"train": CHATS, "tokenizer": "data/tokenizer"}
    assert not problems_of(sft=text, data=data)
    assert "sft.train_on: has no effect without sft.train" in problems_of(sft=text | {"train_on": "all"}, data=data)[0]
    cached = {"teacher": None, "cache": "a"}
    (problem,) = problems_of(sft=text, data=data, distill=cached)
    assert problem.startswith("data.packing: concat cuts documents") and problem.endswith("would work: best_fit")


def test_a_cache_has_no_answers_of_the_student():
    answers = {"distill": {"teacher": None, "cache": "a", "lmbda": 0.5}, "rollout": {"max_new_tokens": 8}}
    (problem,) = problems_of(**answers)
    assert problem.startswith("distill.lmbda: a cache knows nothing")


def test_students_may_begin_at_random_and_answer():
    assert not problems_of() and not problems_of("teacher_cache")
    assert not problems_of(distill={"lmbda": 0.5}, rollout={"max_new_tokens": 8})
