"""One turn of a file, in OpenAI's, ShareGPT's or LLaMA-Factory's spelling, as a `Message`; and which turns may follow.

Torch-free. Knows neither columns nor files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from configs.sections.sft import ChatRole
from trainer.data.chat.conversation import BadRow, Message, Role, ToolCall
from trainer.data.chat.tool_json import describe, parse_calls

FUNCTION_CALL = "function_call"
ROLES: dict[str, Role] = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "tool": "tool", "observation": "tool", "function": "tool", "function_response": "tool", "tool_response": "tool",
    "tool_result": "tool", "ipython": "tool",
}  # fmt: skip
_CALLS = {FUNCTION_CALL, "tool_call"}
_REASONING = ("reasoning_content", "thinking", "reasoning")
_WEIGHTS = ("loss_weight", "weight")  # LLaMA-Factory's, and that of OpenAI's fine-tuning
_PARTS = {"reasoning": 0, "thinking": 0, "text": 1, "tool_call": 2}  # in the order in which a turn is written
MEDIA = {"images", "image", "audios", "audio", "videos", "video"}  # keys of turns, and columns
_MOST_CHARACTERS = 40  # of a name in a message
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>", re.DOTALL)
# How data whose calls are plain text (Hermes, Glaive) marks them; a result may follow these too.
_CALLS_AS_TEXT = ("<tool_call>", "<functioncall>", "<function=", "[TOOL_CALLS]", "<|python_tag|>")


def parse_turn(turn: Any, columns: Mapping[str, str], roles: Mapping[str, ChatRole]) -> Message:
    """Read one turn.

    `columns` may name the keys that hold `role` and `content`, which are else these, or `from` and `value`; `roles`
    names roles beside the known ones. Raises BadRow with a sentence that does not say which turn.
    """
    if not isinstance(turn, dict):
        raise BadRow(f'{describe(turn)}, not a turn like {{"role": "user", "content": "..."}}')
    role = _find_role(turn, columns, roles)
    content = turn.get(columns.get("content") or ("content" if "content" in turn else "value"))
    has_more = len(turn) > 2 or not isinstance(content, str)  # than a role and text
    is_trained = not has_more or _is_trained(turn)
    if role in _CALLS:
        return _parse_function_call(content, is_trained)
    text, reasoning, calls = _parse_content(content, role, turn)
    if has_more:
        reasoning, calls = _parse_rest(turn, role, reasoning, calls)
    if role == "assistant":
        if not calls and not reasoning and not text.strip():
            raise BadRow("an assistant's turn that says nothing and calls nothing; drop the turn, or the row")
        return Message("assistant", text, reasoning, calls, is_trained=is_trained)
    if role == "tool":
        call_id, name = _name_in(turn, "tool_call_id"), _name_in(turn, "name")
        return Message("tool", text, tool_call_id=call_id, name=name, is_trained=is_trained)
    return Message(cast(Role, role), text, is_trained=is_trained)


def check_order(messages: Sequence[Message], where: str, *, needs_answer: bool = True) -> None:
    """Raise BadRow unless there is a turn to learn, where one is needed, and every result of a tool follows a call.

    All other orders are left to the chat template.
    """
    called: Message | None = None  # the turn whose calls the next results answer
    has_answer = False
    for number, message in enumerate(messages):
        if message.role == "assistant":
            has_answer, called = True, message
        elif message.role != "tool":
            called = None
        elif called is None or not _answers(message, called):
            which = f" with the id {message.tool_call_id!r}" if called and called.tool_calls else ""
            raise BadRow(
                f"{where}[{number}]: a tool's result without a call{which} before it; give the turn before it "
                "tool_calls (ShareGPT: function_call), or drop the row"
            )
    if needs_answer and not has_answer:
        found = f"only {', '.join(dict.fromkeys(message.role for message in messages))}" if messages else "no turn"
        raise BadRow(f"{where}: {found}, and so nothing to learn; a conversation needs a turn of the assistant")


def _answers(result: Message, called: Message) -> bool:
    ids = {call.id for call in called.tool_calls}
    if called.tool_calls:
        return result.tool_call_id is None or None in ids or result.tool_call_id in ids
    return any(mark in called.content for mark in _CALLS_AS_TEXT)


def check_text(text: Any, what: str) -> str:
    """Return `text`. Raises BadRow unless it is text that UTF-8 can hold."""
    if not isinstance(text, str):
        raise BadRow(f"{what} is {describe(text)}, not text; write it as a string")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadRow(f"{what} holds half a surrogate pair; replace it by \\ufffd") from error
    return text


def _find_role(turn: dict[str, Any], columns: Mapping[str, str], roles: Mapping[str, ChatRole]) -> str:
    """Return a role, or the name of a turn that holds a call."""
    name = turn.get(columns.get("role") or ("role" if "role" in turn else "from"))
    if not isinstance(name, str):
        missing = "no role" if name is None else f"a role that is {describe(name)}"
        advice = 'write {"role": ..., "content": ...} or {"from": ..., "value": ...}'
        mapped = "name other keys under columns, e.g. columns: {role: speaker, content: text}"
        raise BadRow(f"{missing} among its keys {list(turn)}; {advice}, or {mapped}")
    found = roles.get(name) or ROLES.get(name) or (name if name in _CALLS else None)
    if found is None:
        known = ", ".join([*ROLES, *sorted(_CALLS)])
        short = name if len(name) <= _MOST_CHARACTERS else name[:_MOST_CHARACTERS] + "..."
        raise BadRow(f"unknown role {short!r}; known are {known}; name others, e.g. roles: {{{short}: assistant}}")
    return found


def _is_trained(turn: dict[str, Any]) -> bool:
    """Return what `train` and `loss_weight` say; true where neither is there."""
    train = turn.get("train")
    if train is not None and not isinstance(train, bool):
        raise BadRow(f"train is {describe(train)}; give true or false")
    is_trained = train is not False
    for key in _WEIGHTS:
        weight = turn.get(key)
        if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
            raise BadRow(f"{key} is {weight!r}; give 0 (not trained) or 1, since turns are not weighed in between")
        is_trained = is_trained and weight != 0
    return is_trained


def _parse_function_call(content: Any, is_trained: bool) -> Message:
    """Read a turn whose content is a call, or a list of calls, behind a thought in LLaMA-Factory's marks if any."""
    reasoning = None
    if isinstance(content, str) and (thought := _THOUGHT.match(content)):
        reasoning, content = thought.group(1).strip() or None, content[thought.end() :]
    return Message("assistant", "", reasoning, _some_calls(content, "a function_call"), is_trained=is_trained)


def _some_calls(value: Any, what: str) -> tuple[ToolCall, ...]:
    calls = parse_calls(value)
    if not calls:
        raise BadRow(f'{what} without a call; write it like {{"name": "add", "arguments": {{"a": 1}}}}')
    return calls


def _parse_content(content: Any, role: str, turn: dict[str, Any]) -> tuple[str, str | None, tuple[ToolCall, ...]]:
    """Return text, reasoning and calls of a content that is text, null or a list of parts."""
    if isinstance(content, str):
        return check_text(content, "the content"), None, ()
    if content is None:
        if role not in ("assistant", "tool"):
            raise BadRow(f"no content among its keys {list(turn)}; give text, or drop the turn")
        return "", None, ()
    if not isinstance(content, list):
        raise BadRow(f"the content is {describe(content)}; give a string, or a list of parts")
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    last = 0
    for part in content:
        kind, value = _open_part(part)
        if _PARTS[kind] != 1 and role != "assistant":
            raise BadRow(f"a {kind} part in a turn of role {role}; only the assistant's have such")
        if _PARTS[kind] < last:
            raise BadRow(f"a {kind} part behind one of text or a call; templates write reasoning, text, calls")
        last = _PARTS[kind]
        if kind == "tool_call":
            calls += _some_calls(value, "a tool_call part")
        else:
            (texts if kind == "text" else thoughts).append(check_text(value, f"a {kind} part"))
    return "".join(texts), "".join(thoughts) or None, tuple(calls)


def _open_part(part: Any) -> tuple[str, Any]:
    """Return kind and content of a part."""
    if isinstance(part, str):
        return "text", part
    kind = part.get("type") if isinstance(part, dict) else describe(part)
    if not isinstance(part, dict) or not isinstance(kind, str) or kind not in _PARTS:
        known = ", ".join(_PARTS)
        raise BadRow(f"a part of type {kind!r} in the content; read are {known}, not images, audio or video")
    return kind, next((part[key] for key in ("value", kind, "text") if part.get(key) is not None), None)


def _parse_rest(
    turn: dict[str, Any], role: str, reasoning: str | None, calls: tuple[ToolCall, ...]
) -> tuple[str | None, tuple[ToolCall, ...]]:
    """Return reasoning and calls, those of keys beside the content included."""
    for key in sorted(MEDIA & turn.keys()):
        if turn[key]:
            raise BadRow(f"{key} in the turn, and only text is learnt here; drop the row, or the key")
    thoughts = {check_text(turn[key], key) for key in _REASONING if turn.get(key)}
    if reasoning:
        thoughts.add(reasoning)
    if len(thoughts) > 1:
        raise BadRow(f"two different texts of reasoning; keep one of {', '.join(_REASONING)} and the reasoning part")
    called = (*parse_calls(turn.get("tool_calls")), *parse_calls(turn.get("function_call")))
    if role != "assistant" and (thoughts or called):
        what = "reasoning" if thoughts else "tool_calls"
        raise BadRow(f"{what} in a turn of role {role}; only the assistant's have such")
    if calls and called:
        raise BadRow("calls both as parts of the content and as tool_calls; keep one of them")
    return next(iter(thoughts), None), calls or called


def _name_in(turn: dict[str, Any], key: str) -> str | None:
    value = turn.get(key)
    return None if value is None else check_text(value, key)
