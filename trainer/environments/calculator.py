"""The environment of a calculator: the policy asks it for sums that are too large to do in one's head, and answers.

With it the tasks it is for, with worked conversations to learn calls from.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from configs.errors import BadInput
from trainer.environments.arithmetic import BadExpression, work_out
from trainer.environments.environment import Message, Turn
from trainer.environments.small_tasks import ANSWER

_NAME = "calculate"
_EXAMPLE = '{"name": "calculate", "arguments": {"expression": "(12 + 3) * 4"}}'
_TOOLS: tuple[Mapping[str, Any], ...] = (
    {
        "type": "function",
        "function": {
            "name": _NAME,
            "description": "Work out an expression.",
            "parameters": {
                "type": "object",
                "properties": {"expression": {"type": "string", "description": "Such as (12 + 3) * 4"}},
                "required": ["expression"],
            },
        },
    },
)
_OPENING, _CLOSING = "<tool_call>", "</tool_call>"
_MOST_CALLS = 4


class Calculator:
    """Conversations about rows with an `answer`; the reply without a call is the last one, and is checked."""

    tools = _TOOLS

    def begin(self, row: Mapping[str, Any], seed: int) -> list[Message]:
        """Return the row's `messages` up to the first turn of the assistant. Raises BadInput for a row without."""
        messages = row.get("messages")
        if row.get("answer") is None or not isinstance(messages, Sequence):
            raise BadInput("grpo.environment=calculator needs rows with messages and answer, as calculator tasks have")
        roles = [message["role"] for message in messages]
        return list(messages[: roles.index("assistant")] if "assistant" in roles else messages)

    def answer(self, row: Mapping[str, Any], messages: Sequence[Message], reply: str) -> Turn:
        """Return the results of the calls in a reply (Hermes's <tool_call>, or JSON alone as Llama 3 writes it).

        A call that is none, or that cannot be worked out, gets a result that says so. A reply without a call has reward
        1.0 where what follows its last "The answer is " is the row's answer, else 0.0.
        """
        said = {"role": "assistant", "content": reply}
        calls = _calls_in(reply)
        if not calls:
            _, found, final = reply.rpartition(ANSWER)
            is_right = bool(found) and final.strip().rstrip(".").replace(",", "") == str(row["answer"])
            return Turn((said,), float(is_right), is_done=True)
        results = [_result_of(call) for call in calls[:_MOST_CALLS]]
        results += [f"error: at most {_MOST_CALLS} calls at once" for _ in calls[_MOST_CALLS:][:1]]
        return Turn((said, *({"role": "tool", "name": _NAME, "content": one} for one in results)), None, is_done=False)


def _calls_in(reply: str) -> list[str]:
    """Return the JSON of each call in a reply, as it is written; one that is not closed reaches to the end."""
    calls: list[str] = []
    _, is_open, rest = reply.partition(_OPENING)
    while is_open and len(calls) <= _MOST_CALLS:  # one more tells that there are too many
        call, _, rest = rest.partition(_CLOSING)
        calls.append(call)
        _, is_open, rest = rest.partition(_OPENING)
    if not calls and reply.lstrip().startswith("{") and '"name"' in reply:
        calls.append(reply)
    return calls


def _result_of(call: str) -> str:
    try:
        content = json.loads(call)
    except (ValueError, RecursionError):
        return f"error: the call is no JSON; write it like {_EXAMPLE}"
    if not isinstance(content, dict) or content.get("name") != _NAME:
        return f"error: the only tool is {_NAME}; write a call like {_EXAMPLE}"
    arguments = content.get("arguments", content.get("parameters"))
    if not isinstance(arguments, dict) or not isinstance(arguments.get("expression"), str):
        return f"error: the arguments have no expression; write a call like {_EXAMPLE}"
    try:
        return work_out(arguments["expression"])
    except BadExpression as error:
        return f"error: {error}"


@dataclass(frozen=True)
class CalculatorTask:
    """A question, the expression that answers it, and its value."""

    kind: str
    question: str
    expression: str
    answer: str

    @property
    def row(self) -> dict[str, Any]:
        """A row of data: a worked conversation with one call under `messages`, `tools`, and the `answer`."""
        call = {"type": "function", "function": {"name": _NAME, "arguments": {"expression": self.expression}}}
        messages = [
            {"role": "user", "content": self.question},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": _NAME, "content": self.answer},
            {"role": "assistant", "content": f"{ANSWER}{self.answer}."},
        ]
        return {"messages": messages, "tools": list(_TOOLS), "kind": self.kind, "answer": self.answer}


def draw_calculator_task(source: random.Random, max_digits: int) -> CalculatorTask:
    """Draw a product, sum, difference or mixed expression of whole numbers of two to `max_digits` digits."""
    first, second, third = (source.randrange(12, 10 ** source.randrange(2, max_digits + 1)) for _ in range(3))
    kind, expression, question = source.choice((
        ("product", f"{first} * {second}", f"What is {first} times {second}?"),
        ("sum", f"{first} + {second} + {third}", f"What do {first}, {second} and {third} make together?"),
        ("difference", f"{first} - {second}", f"What is {second} less than {first}?"),
        ("mixed", f"{first} * {second} + {third}", f"There are {first} boxes of {second} and {third} more. How many?"),
    ))  # fmt: skip
    return CalculatorTask(kind, question, expression, work_out(expression))
