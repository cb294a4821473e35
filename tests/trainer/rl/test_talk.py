"""Conversations with an environment: what it does wrong is one conversation's fault, and named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from trainer.data.chat.conversation import BadRow, Conversation, Message
from trainer.data.chat.prompts import Prompt
from trainer.environments.scoring import Score
from trainer.rl.collect import as_rollout
from trainer.rl.talk import Talk, begin_conversation


class Giving:
    """An environment that gives what it was made with, or raises it."""

    tools = ()

    def __init__(self, given: Any) -> None:
        self._given = given

    def begin(self, row: Any, seed: int) -> Any:
        if isinstance(self._given, Exception):
            raise self._given
        return self._given


@pytest.mark.parametrize("given", [None, RuntimeError("boom"), "hi", [3]])
def test_what_cannot_begin_names_the_environment(given):
    with pytest.raises(BadRow, match="grpo.environment cannot begin"):
        begin_conversation(Giving(given), {}, "x.jsonl", 3, seed=0)


def test_what_was_said_is_a_conversation_even_where_it_is_nothing():
    question = Conversation((Message("user", "1 + 1?"),), ({"type": "function"},), "x.jsonl", 3)
    talk = Talk.begin(Prompt("x", 3, [1, 2], question, {}), 0, 0)
    talk.texts.append("")
    talk.end()
    assert talk.as_conversation() == replace(question, messages=(Message("user", "1 + 1?"), Message("assistant", "")))
    talk.messages += [{"role": "tool", "content": "2"}, {"role": "assistant", "content": " two"}]
    conversation = talk.as_conversation()
    assert isinstance(conversation, Conversation)
    *_, result, last = conversation.messages
    assert (result.role, result.content, last.role, last.content) == ("tool", "2", "assistant", " two")
    talk.messages.append({"role": "user", "content": "\ud800"})
    assert isinstance(talk.as_conversation(), BadRow)


@pytest.mark.parametrize(
    ("score", "given", "total"),
    [
        (Score(0.5, {"exact": 0.5}), [1.0, 2.0], 3.5),
        (Score(None, {"exact": None}), [1.0, 2.0], 3.0),  # as with a reward model's value
        (Score(None, {"exact": None}), [], None),
        (Score(None, {"exact": None}, {"exact": "raised"}), [1.0], None),
    ],
)
def test_the_environments_reward_counts_where_no_function_applies(score, given, total):
    question = Conversation((Message("user", "1 + 1?"),), (), "x.jsonl", 3)
    talk = Talk.begin(Prompt("x", 3, [1, 2], question, {}), 0, 0)
    talk.rewards += given
    assert as_rollout(talk, score).score == total
