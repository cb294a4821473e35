"""Conversations with an environment: what it does wrong is one conversation's fault, and named."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.data.chat.conversation import BadRow
from trainer.environments.environment import Turn
from trainer.rl.talk import ask, begin_conversation

SAID = {"role": "assistant", "content": "4"}
TALK: Any = SimpleNamespace(prompt=SimpleNamespace(columns={}), messages=[], texts=["4"])


class Giving:
    """An environment that gives what it was made with, or raises it."""

    tools = ()

    def __init__(self, given: Any) -> None:
        self._given = given

    def begin(self, row: Any, seed: int) -> Any:
        return self._give()

    def answer(self, row: Any, messages: Any, reply: str) -> Any:
        return self._give()

    def _give(self) -> Any:
        if isinstance(self._given, Exception):
            raise self._given
        return self._given


@pytest.mark.parametrize(
    "given",
    [
        None, "right", RuntimeError("boom"), Turn((SAID,), math.nan, True), Turn((SAID,), "1", True),  # type: ignore[arg-type]
        Turn((), 1.0, True), Turn(("4",), 1.0, True),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_what_is_no_turn_is_the_fault_of_its_conversation(given):
    assert isinstance(ask(Giving(given), TALK), str)


def test_a_turn_is_handed_on():
    turn = Turn((SAID,), 1, True)
    assert ask(Giving(turn), TALK) is turn and ask(Giving(Turn((SAID,), None, False)), TALK) != turn
    assert ask(None, TALK) == Turn((SAID,), None, is_done=True)


@pytest.mark.parametrize("given", [None, RuntimeError("boom"), "hi", [3]])
def test_what_cannot_begin_names_the_environment(given):
    with pytest.raises(BadRow, match="grpo.environment cannot begin"):
        begin_conversation(Giving(given), {}, "x.jsonl", 3, seed=0)
