"""A conversation as every form of file is read into, and every chat template is given. Knows no files and no tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]


class BadRow(Exception):
    """A row that is no conversation, or that its template cannot render; the message says why, without file and row."""


@dataclass(frozen=True)
class ToolCall:
    """A call that the assistant makes."""

    name: str
    arguments: Mapping[str, Any] | str
    """By parameter; text where the data holds what is no JSON object."""
    id: str | None = None


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: Role
    content: str = ""
    reasoning: str | None = None
    """What the assistant thinks before it answers."""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    """Which call a tool's result answers."""
    name: str | None = None
    """Of the tool whose result this is."""
    is_trained: bool = True
    """False keeps a turn of the assistant from being trained, whatever the rule (`train: false`, `loss_weight: 0`)."""


@dataclass(frozen=True)
class Conversation:
    """Turns in order, and the tools that the assistant may call."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    """Definitions as OpenAI's: `{"type": "function", "function": {"name", "description", "parameters"}}`."""
    source: str = ""
    """File it comes from."""
    row: int = 0
    """Its number in that file, from 0."""
