"""Rules of learning from preferences, and what the loss decides where the config does not."""

from __future__ import annotations

from typing import Any

import pytest

from configs.rules.check import check_config
from configs.sections.preference import PreferenceSection
from configs.stages import PreferenceConfig
from tests.small_runs import DENSE_MODEL

PAIRS = [{"path": "data/pairs.jsonl"}]


def problems_of(**preference: Any) -> list[str]:
    """Return what is wrong with a valid config that has these fields."""
    fields = {"train": PAIRS, "validation": PAIRS, "template": "chatml"} | preference
    config = PreferenceConfig.model_validate(
        {
            "model": DENSE_MODEL,
            "data": {"tokenizer": "data/tokenizer"},
            "train": {"num_steps": 5, "seq_len": 32},
            "precision": {"compute": "fp32"},
            "schedule": {"kind": "constant"},
            "checkpoint": {"init_from": "runs/chat"},
            "preference": fields,
        }
    )
    return check_config(config, 1, platform="cpu", has_te=False)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"label_smoothing": 0.2}, "preference.label_smoothing: has no effect with preference.loss=dpo"),
        ({"loss": "ipo", "length_penalty": 0.2}, "preference.length_penalty: has no effect with preference.loss=ipo"),
        ({"loss": "orpo", "sft_weight": 1}, "preference.sft_weight: has no effect with preference.loss=orpo"),
        ({"loss": "kto", "num_answers": 9}, "preference.num_answers: has no effect with preference.loss=kto"),
        ({"validation": [], "num_answers": 9}, "preference.num_answers: has no effect without preference.validation"),
        ({"train": []}, "preference.train: 5 steps need at least one source"),
    ],
)
def test_what_is_not_read_is_refused(fields, words):
    (problem,) = problems_of(**fields)
    assert problem.startswith(words) and "that would work: " in problem


@pytest.mark.parametrize(
    "fields",
    [{}, {"loss": "cdpo", "label_smoothing": 0.2}, {"loss": "kto", "undesirable_weight": 1.5}, {"loss": "simpo"}],
)
def test_what_is_read_is_let_in(fields):
    assert not problems_of(**fields)


def test_a_loss_has_its_own_beta_and_may_need_no_reference():
    methods = {
        loss: PreferenceSection.model_validate({"loss": loss}).method for loss in ("dpo", "simpo", "orpo", "kto")
    }
    assert {loss: method.beta for loss, method in methods.items()} == {
        "dpo": 0.1,
        "simpo": 2.0,
        "orpo": 0.1,
        "kto": 0.1,
    }
    assert [loss for loss, method in methods.items() if method.has_reference] == ["dpo", "kto"]
