"""Conversations with an environment: what it does wrong is one conversation's fault, and named."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.data.chat.conversation import BadRow
from trainer.rl.talk import begin_conversation


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
