"""Rules of packing and of long documents: one sentence with the field first and a value that works after it."""

from __future__ import annotations

import re

import pytest

from configs.rules.check import check_config
from configs.stages import Config

MODEL = {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 2, "vocab_size": 100}
LONG = {"path": "a", "long_document_tokens": 99, "long_document_share": 0.5}


def problems_of(world_size: int = 1, parallel: dict | None = None, **data) -> list[str]:
    sections = {"model": MODEL, "train": {"num_steps": 1, "seq_len": 64}, "parallel": parallel or {}}
    config = Config.model_validate(sections | {"data": {"train": [{"path": "a"}]} | data})
    return check_config(config, world_size, platform="cpu", has_te=False)


def test_what_can_be_read_has_no_problem():
    assert problems_of(2, {"cp": 2}, packing="best_fit", document_mask=True, train=[LONG]) == []
    assert problems_of(train=[LONG | {"long_document_share": 1.0}, {"path": "b"}]) == []


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"packing": "best_fit"}, "data.document_mask: false would let .* see each other; .* would work: true"),
        (
            {"train": [{"path": "a"}, LONG | {"path": "b", "long_document_tokens": None}]},
            r"data.train\[1\].long_document_tokens: is needed beside long_document_share; .* would work: 64 \(or",
        ),
        (
            {"train": [LONG | {"long_document_share": None}]},
            r"data.train\[0\].long_document_share: is needed beside long_document_tokens; .* would work: 0.7 \(or",
        ),
        (
            {"train": [LONG | {"long_document_share": 1e-14}]},
            "data.train: the weights are too large to be added, or too far apart",
        ),
        (
            {"validation": [{"path": "c", "long_document_tokens": 9}]},
            r"data.validation\[0\].long_document_tokens: has no effect on what is only evaluated; .* would work: null",
        ),
    ],
)
def test_what_contradicts_itself_is_told(data, sentence):
    (found,) = problems_of(**data)
    assert re.match(sentence, found), found


@pytest.mark.parametrize("weights", [(1e308, 1e308), (1e308, 1e-300), (1.0, 1e-300)])
def test_weights_that_cannot_be_shares_are_refused(weights):
    found = problems_of(train=[{"path": f"source{number}", "weight": weight} for number, weight in enumerate(weights)])
    assert len(found) == 1 and found[0].startswith("data.train: the weights are too large to be added, or too far")
    assert "values that would work" in found[0]


def test_weights_far_apart_but_drawn_from_are_kept():
    assert problems_of(train=[{"path": "a", "weight": 1e300}, {"path": "b", "weight": 1e292}]) == []
