"""Definitions and calls of tools, in each spelling that data sets have, as the one that chat templates are given.

Torch-free. Knows neither turns nor files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from trainer.data.chat.conversation import BadRow, ToolCall

_DEFINITION = '[{"type": "function", "function": {"name": "add", "description": "...", "parameters": {...}}}]'
_CALL = '{"name": "add", "arguments": {"a": 1}}'


def parse_tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    """Return the definitions in a `tools` column: a list, or JSON of one; nothing, "" and "[]" are none.

    One without the wrapper {"type": "function", "function": ...} is given it. Raises BadRow.
    """
    if isinstance(value, str):
        value = _parse_json(value, f"tools is no JSON; write a list like {_DEFINITION}") if value.strip() else None
    if value is None:
        return ()
    if not isinstance(value, list):
        value = [value]
    definitions = tuple(_parse_definition(entry, number) for number, entry in enumerate(value))
    check_json(definitions, "tools")
    return definitions


def _parse_definition(entry: Any, number: int) -> dict[str, Any]:
    advice = f"write a list like {_DEFINITION}"
    if isinstance(entry, str):
        entry = _parse_json(entry, f"tools[{number}] is no JSON; {advice}")
    if not isinstance(entry, dict):
        raise BadRow(f"tools[{number}] is {describe(entry)}, not a definition; {advice}")
    if not isinstance(entry.get("function"), dict):
        entry = {"function": {key: value for key, value in entry.items() if (key, value) != ("type", "function")}}
    name = entry["function"].get("name")
    if not isinstance(name, str) or not name:
        raise BadRow(f"tools[{number}] has no name; {advice}")
    return {"type": "function", **entry}


def parse_calls(value: Any) -> tuple[ToolCall, ...]:
    """Return the calls in `tool_calls` or a `function_call` turn: an object, a list, or JSON of one; "" is none.

    Arguments that are JSON of an object become it, other text stays text. Raises BadRow.
    """
    if isinstance(value, str):
        value = _parse_json(value, f"a call that is no JSON; write it like {_CALL}") if value.strip() else None
    if value is None:
        return ()
    calls = tuple(map(_parse_call, value if isinstance(value, list) else [value]))
    check_json([(call.name, call.arguments, call.id) for call in calls], "the call")
    return calls


def _parse_call(entry: Any) -> ToolCall:
    if isinstance(entry, str):
        entry = _parse_json(entry, f"a call that is no JSON; write it like {_CALL}")
    if not isinstance(entry, dict):
        raise BadRow(f"a call that is {describe(entry)}, not an object; write it like {_CALL}")
    inner = entry["function"] if isinstance(entry.get("function"), dict) else entry
    name, arguments, identity = inner.get("name"), inner.get("arguments"), entry.get("id")
    if not isinstance(name, str) or not name:
        raise BadRow(f"a call without the name of a tool; write it like {_CALL}")
    if arguments is None:
        arguments = inner.get("parameters") or {}  # as Llama 3 writes calls
    if isinstance(arguments, str):
        arguments = _object_in(arguments)
    elif not isinstance(arguments, dict):
        raise BadRow(f"a call of {name!r} whose arguments are {describe(arguments)}, not an object; like {_CALL}")
    if identity is not None and not isinstance(identity, str):
        raise BadRow(f"a call of {name!r} whose id is {describe(identity)}; write it as a string")
    return ToolCall(name, arguments, identity)


def _object_in(text: str) -> Mapping[str, Any] | str:
    try:
        value = _JSON.decode(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def check_json(value: Any, what: str) -> None:
    """Raise BadRow unless a template can write `value` as JSON, and that as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{what} holds half a surrogate pair; replace it by \\ufffd") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow(f"{what} holds what JSON cannot ({error}); write it as text") from error


def describe(value: Any) -> str:
    """Return the kind of a value in words of JSON."""
    for kind, words in _KINDS.items():
        if isinstance(value, kind):
            return words
    return "null" if value is None else type(value).__name__


_KINDS = {str: "a string", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


_JSON = json.JSONDecoder(parse_constant=_refuse_constant)


def _parse_json(text: str, sentence: str) -> Any:
    try:
        return _JSON.decode(text)
    except (ValueError, RecursionError) as error:
        raise BadRow(sentence) from error
