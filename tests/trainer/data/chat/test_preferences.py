"""Rows of preferences in the forms of TRL and LLaMA-Factory, and what is wrong with them in one sentence."""

from __future__ import annotations

from typing import Any

import pytest

from configs.sections.sft import ConversationSource
from trainer.data.chat.conversation import BadRow
from trainer.data.chat.preferences import parse_judged, parse_pairs

Q, GOOD, BAD = "What is up?", "The sky.", "A fish."
USER, YES, NO = (
    {"role": role, "content": text} for role, text in (("user", Q), ("assistant", GOOD), ("assistant", BAD))
)
SOURCE = ConversationSource(path="pairs.jsonl")
SHAPES: dict[str, dict[str, Any]] = {
    "trl_text": {"prompt": Q, "chosen": GOOD, "rejected": BAD},
    "trl_turns": {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
    "trl_implicit": {"chosen": [USER, YES], "rejected": [USER, NO]},
    "trl_implicit_beside_text": {"prompt": Q, "chosen": [USER, YES], "rejected": [USER, NO]},
    "trl_implicit_text": {"chosen": f"{Q} {GOOD}", "rejected": f"{Q} {BAD}"},
    "factory": {
        "conversations": [{"from": "human", "value": Q}],
        "chosen": {"from": "gpt", "value": GOOD},
        "rejected": {"from": "gpt", "value": BAD},
    },
    "factory_alpaca": {"instruction": Q, "input": "", "chosen": GOOD, "rejected": BAD},
    "ranked": {"prompt": Q, "ranked": [GOOD, BAD]},
    "ranked_by_scores": {"messages": [USER], "ranked": [BAD, GOOD], "scores": [0.5, 3]},
}


def texts(conversation: Any) -> list[tuple[str, str, bool]]:
    """Return role, text and whether it is trained of each turn."""
    return [(message.role, message.content, message.is_trained) for message in conversation.messages]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_pair_in_every_form_is_the_same(shape):
    [pair] = parse_pairs(SHAPES[shape], SOURCE, "f", 3)
    assert texts(pair.chosen) == [("user", Q, False), ("assistant", GOOD, True)]
    assert texts(pair.rejected) == [("user", Q, False), ("assistant", BAD, True)]
    assert (pair.chosen.source, pair.chosen.row) == ("f", 3)


@pytest.mark.parametrize("margin", [None, 0, 2, 0.75])
def test_a_margin_is_the_pairs_and_no_part_of_its_prompt(margin):
    [pair] = parse_pairs({"chosen": f"{Q} {GOOD}", "rejected": f"{Q} {BAD}", "margin": margin}, SOURCE, "f", 3)
    assert pair.margin == (margin or 0.0) and texts(pair.chosen)[0] == ("user", Q, False)


def test_earlier_answers_and_the_system_prompt_are_context():
    row = {"system": "Be short.", "chosen": [USER, YES, USER, YES], "rejected": [USER, YES, USER, NO]}
    [pair] = parse_pairs(row, SOURCE, "f", 0)
    assert texts(pair.rejected) == [
        ("system", "Be short.", False), ("user", Q, False), ("assistant", GOOD, False), ("user", Q, False),
        ("assistant", BAD, True),
    ]  # fmt: skip


def test_a_ranked_list_gives_a_pair_for_every_two_of_different_rank():
    row = {"prompt": Q, "ranked": ["a", "b", "c"], "scores": [1, 2, 1]}
    pairs = [
        (pair.chosen.messages[-1].content, pair.rejected.messages[-1].content)
        for pair in parse_pairs(row, SOURCE, "", 0)
    ]
    assert pairs == [("b", "a"), ("b", "c")]
    assert len(parse_pairs({"prompt": Q, "ranked": list("abcd")}, SOURCE, "", 0)) == 6


def test_columns_may_have_other_names():
    source = ConversationSource.model_validate(
        {"path": "p", "columns": {"prompt": "question", "chosen": "better", "rejected": "worse"}}
    )
    [pair] = parse_pairs({"question": Q, "better": GOOD, "worse": BAD}, source, "", 0)
    assert texts(pair.rejected) == [("user", Q, False), ("assistant", BAD, True)]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, NO], "label": False},
        {"prompt": Q, "completion": BAD, "label": False},
        {"conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": BAD}], "label": False},
    ],
)
def test_a_label_is_of_the_last_answer(row):
    [judged] = parse_judged(row, SOURCE, "", 0)
    assert not judged.is_good and texts(judged.whole) == [("user", Q, False), ("assistant", BAD, True)]


def test_a_pair_is_a_good_and_a_bad_answer():
    judged = parse_judged(SHAPES["trl_text"], SOURCE, "", 0)
    assert [(one.is_good, one.answer[0].content) for one in judged] == [(True, GOOD), (False, BAD)]


BAD_PAIRS: dict[str, tuple[dict[str, Any], str]] = {
    "equal": ({"prompt": Q, "chosen": GOOD, "rejected": GOOD}, "chosen and rejected are equal"),
    "equal_texts": ({"chosen": GOOD, "rejected": GOOD}, "chosen and rejected are equal"),
    "empty": ({"prompt": Q, "chosen": " ", "rejected": BAD}, "chosen is empty"),
    "empty_list": ({"prompt": [USER], "chosen": [], "rejected": [NO]}, "chosen is empty"),
    "missing": ({"prompt": Q, "chosen": GOOD}, "rejected is missing"),
    "number": ({"prompt": Q, "chosen": GOOD, "rejected": 3}, "rejected is a number"),
    "no_prompt": ({"chosen": "Yes.", "rejected": "No."}, "no beginning in common"),
    "other_questions": ({"chosen": [{**USER, "content": "?"}, YES], "rejected": [USER, NO]}, "different questions"),
    "no_answer": ({"chosen": [USER, YES], "rejected": [USER, YES, USER, NO]}, "chosen has no answer"),
    "answered": ({"messages": [USER, YES], "chosen": GOOD, "rejected": BAD}, "its prompt ends with an answer"),
    "one_ranked": ({"prompt": Q, "ranked": [GOOD]}, "two answers or more"),
    "ties": ({"prompt": Q, "ranked": [GOOD, BAD], "scores": [1, 1]}, "all equal or of one score"),
    "scores": ({"prompt": Q, "ranked": [GOOD, BAD], "scores": [1]}, "a number for each of the 2 answers"),
    "margin": ({"prompt": Q, "chosen": GOOD, "rejected": BAD, "margin": "much"}, "margin is 'much'; give a number"),
    "margin_of_list": ({"prompt": Q, "ranked": [GOOD, BAD], "margin": 1}, "margin stands beside ranked"),
}


@pytest.mark.parametrize("name", BAD_PAIRS)
def test_a_bad_pair_is_refused_in_a_sentence(name):
    row, words = BAD_PAIRS[name]
    with pytest.raises(BadRow, match=words):
        parse_pairs(row, SOURCE, "", 0)


@pytest.mark.parametrize("label", ["yes", 1, None, 0.5])
def test_a_label_that_is_neither_true_nor_false_is_refused(label):
    with pytest.raises(BadRow, match="neither true nor false"):
        parse_judged({"messages": [USER, YES], "label": label}, SOURCE, "", 0)
    with pytest.raises(BadRow, match="no label in its columns messages; .* or name yours in columns"):
        parse_judged({"messages": [USER, YES]}, SOURCE, "", 0)
