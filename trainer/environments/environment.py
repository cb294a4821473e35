"""Who the policy talks to over several turns: what an environment must offer, and how one is found by name."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from configs.errors import BadInput, in_one_line

Message = Mapping[str, Any]
"""`role` and `content`; of a tool's result also `name`."""


@dataclass(frozen=True)
class Turn:
    """What an environment makes of a reply."""

    messages: tuple[Message, ...]
    """What is to be added to the conversation: the reply as the assistant's message, then what answers it."""
    reward: float | None
    """Of this reply; None for no reward by itself. The rewards of a conversation are added up."""
    is_done: bool
    """Nothing answers the reply, and the conversation is over."""


class Environment(Protocol):
    """Conversations about rows of data. It keeps no state: a turn follows from its arguments alone.

    What a policy may write has no bounds, so whatever is wrong with a reply is said in a message and never raised.
    """

    tools: Sequence[Mapping[str, Any]]
    """Definitions as OpenAI's, which the chat template shows; empty for none."""

    def begin(self, row: Mapping[str, Any], seed: int) -> list[Message]:
        """Return the messages that the policy answers first. Raises BadInput for a row that it cannot use."""
        ...

    def answer(self, row: Mapping[str, Any], messages: Sequence[Message], reply: str) -> Turn:
        """Return what follows a reply, its text without the end-of-turn token, to the messages so far."""
        ...


def is_turn(turn: object) -> bool:
    """Return whether an environment gave a turn: messages, the reply first, and a reward that is finite or None."""
    if not isinstance(turn, Turn) or not isinstance(turn.messages, list | tuple) or not turn.messages:
        return False
    is_number = isinstance(turn.reward, int | float) and math.isfinite(turn.reward)
    is_said = all(isinstance(one, Mapping) for one in turn.messages) and turn.messages[0].get("role") == "assistant"
    return is_said and isinstance(turn.is_done, bool) and (turn.reward is None or is_number)


_BUILT_IN = {"calculator": "trainer.environments.calculator:Calculator"}


def load_environment(name: str, field: str = "grpo.environment") -> Environment:
    """Return an environment by its name, or a new object of `module:Class`; `field` is where the config names it.

    Raises BadInput.
    """
    module_name, colon, attribute = _BUILT_IN.get(name, name).partition(":")
    if not colon or not module_name or not attribute:
        raise BadInput(f"{field}={name}: must be {' or '.join(_BUILT_IN)}, or module:Class, such as my_games:Chess")
    try:
        environment = getattr(importlib.import_module(module_name), attribute)()
    except Exception as error:
        what = f"{type(error).__name__}: {in_one_line(error)}"
        raise BadInput(f"{field}={name}: cannot be made ({what}); mend it, or try calculator") from error
    missing = [part for part in ("tools", "begin", "answer") if not hasattr(environment, part)]
    if missing:
        raise BadInput(f"{field}={name}: has no {missing[0]}; see Environment in trainer.environments.environment")
    return environment
