"""Rules of fine-tuning: weights, names of validation sources, epochs beside a schedule, and questions."""

from __future__ import annotations

import re

import pytest

from configs.rules.check import check_config
from configs.sections.sft import ConversationSource
from configs.stages import SftConfig

FIXED = {
    "model": {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 2, "vocab_size": 100},
    "data": {"tokenizer": "tokenizer"},
    "checkpoint": {"init_from": "runs/demo"},
}


def problems_of(sft: dict, train: dict | None = None, **sections) -> list[str]:
    source = {"train": [{"path": "a.jsonl"}]}
    fields = FIXED | {"sft": source | sft, "train": {"seq_len": 64} | (train or {"num_steps": 9})} | sections
    return check_config(SftConfig.model_validate(fields), 1, platform="cpu", has_te=False)


@pytest.mark.parametrize(
    ("sft", "sentence"),
    [
        (
            {"train": [{"path": "a", "weight": 1e-300}, {"path": "b", "weight": 1e300}]},
            "sft.train: the weights are .* too far apart",
        ),
        (
            {"train": [{"path": "a", "weight": 1e308}, {"path": "b", "weight": 1e308}]},
            "sft.train: the weights are too large to be added",
        ),
        ({"validation": [{"path": "x/a.jsonl"}, {"path": "y/a.json.gz"}]}, "sft.validation: .* the file name a; "),
        ({"train_on": "all", "num_answers": 7}, "sft.num_answers: has no effect with sft.train_on=all"),
        ({"num_answers": 7}, "sft.num_answers: has no effect without sft.validation, .*; a value that would work: 4"),
        ({"max_answer_tokens": 7}, "sft.max_answer_tokens: has no effect without sft.validation"),
    ],
)
def test_what_contradicts_itself_is_refused(sft, sentence):
    (problem,) = problems_of(sft)
    assert re.match(sentence, problem), problem


def test_a_run_without_validation_may_say_that_it_asks_nothing():
    assert problems_of({"num_answers": 0}) == []


def test_validation_sources_are_told_apart_by_what_follows_a_dot():
    assert problems_of({"validation": [{"path": "v.1.jsonl"}, {"path": "v.2.jsonl"}]}) == []
    names = {"x/a.b.jsonl.zst": "a.b", "folder.v2/": "folder.v2", "c.parquet": "c", "x/..jsonl": "."}
    assert {path: ConversationSource(path=path).name for path in names} == names


def test_a_schedule_is_not_measured_by_steps_that_the_data_will_give():
    schedule = {"warmup_steps": 50}
    assert problems_of({}, {"num_steps": 4, "num_epochs": 100}, schedule=schedule) == []
    (problem,) = problems_of({}, {"num_steps": 4}, schedule=schedule)
    assert problem.startswith("schedule.warmup_steps: 50 is not below train.num_steps=4")


def test_smoothing_leaves_something_to_learn():
    with pytest.raises(ValueError, match="label_smoothing"):
        problems_of({"label_smoothing": 1.0})
