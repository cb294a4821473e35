"""Conversations in the form that chat templates read: OpenAI's messages, and what a template needs of their calls."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.data.chat.conversation import Message, ToolCall


@dataclass(frozen=True)
class CallForm:
    """How a template wants the calls of tools."""

    are_arguments_text: bool = False
    """JSON text instead of an object."""
    needs_ids: bool = False
    """Every call must have an id of nine letters and digits; those that have none are numbered."""


def to_openai(messages: Sequence[Message], form: CallForm) -> list[dict[str, Any]]:
    """Return the messages as templates read them. Keys without a value are left out: templates ask whether they exist.

    Reasoning stands under `reasoning_content` (Qwen3, GLM) and under `thinking` (gpt-oss), as `transformers` gives it.
    """
    result = []
    number = 0
    unanswered: list[str] = []
    for message in messages:
        entry: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.reasoning is not None:
            entry["reasoning_content"] = entry["thinking"] = message.reasoning
        if message.tool_calls:
            calls = [_call(call, form, number + place) for place, call in enumerate(message.tool_calls)]
            number += len(calls)
            unanswered = [call["id"] for call in calls if "id" in call]
            entry["tool_calls"] = calls
        if message.tool_call_id is not None:
            entry["tool_call_id"] = message.tool_call_id
        elif message.role == "tool" and form.needs_ids and unanswered:
            entry["tool_call_id"] = unanswered.pop(0)
        if message.name is not None:
            entry["name"] = message.name
        result.append(entry)
    return result


def _call(call: ToolCall, form: CallForm, number: int) -> dict[str, Any]:
    arguments: Any = call.arguments
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False) if form.are_arguments_text else dict(arguments)
    elif not form.are_arguments_text:
        arguments = _object_or_text(arguments)
    entry: dict[str, Any] = {"type": "function", "function": {"name": call.name, "arguments": arguments}}
    if call.id is not None:
        entry["id"] = call.id
    elif form.needs_ids:
        entry["id"] = f"call{number:05d}"
    return entry


def _object_or_text(text: str) -> Any:
    try:
        parsed = json.loads(text)
    except ValueError:
        return text
    return parsed if isinstance(parsed, dict) else text
