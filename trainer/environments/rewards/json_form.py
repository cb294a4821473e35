"""The reward of an answer that is JSON, and of the form that a schema asks for. Knows a subset of JSON Schema."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from configs.errors import BadInput
from trainer.environments.rewards.reply import Reply

_FENCED = re.compile(r"```(?:json)?[ \t]*\n(.*?)\n?[ \t]*```", re.DOTALL)
_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool,
    "null": type(None),
}  # fmt: skip
_KEYWORDS = ("type", "required", "properties", "items", "enum", "additionalProperties")


def valid_json(reply: Reply, schema: Mapping[str, Any] | None = None, fenced: bool = False) -> float:
    """Return 1.0 where the answer is one JSON value, and has the schema's form if there is one; else 0.0.

    `fenced` takes the last block between ``` lines instead of the whole answer. Of JSON Schema these keywords are
    known: type, required, properties, items, enum, and additionalProperties as true or false; others are refused.
    """
    if schema is not None:
        _check_schema(schema, "options.schema")
    text = reply.text
    if fenced:
        blocks = _FENCED.findall(text)
        if not blocks:
            return 0.0
        text = blocks[-1]
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return 0.0
    return float(schema is None or _has_form(value, schema))


def _has_form(value: Any, schema: Mapping[str, Any]) -> bool:
    kinds = schema.get("type", ())
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_is_kind(value, kind) for kind in kinds):
        return False
    if "enum" in schema and not any(type(value) is type(one) and value == one for one in schema["enum"]):
        return False
    if isinstance(value, list) and "items" in schema:
        return all(_has_form(item, schema["items"]) for item in value)
    if not isinstance(value, dict):
        return True
    properties = schema.get("properties", {})
    if any(key not in value for key in schema.get("required", ())):
        return False
    if schema.get("additionalProperties") is False and any(key not in properties for key in value):
        return False
    return all(_has_form(value[key], inner) for key, inner in properties.items() if key in value)


def _is_kind(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES[kind])


def _check_schema(schema: Any, place: str) -> None:
    """Raise BadInput for what is no schema, or has a keyword that would be ignored."""
    if not isinstance(schema, Mapping):
        raise BadInput(f"{place}: must be a schema; try {{type: object, required: [answer]}}")
    unknown = [key for key in schema if key not in _KEYWORDS]
    if unknown:
        raise BadInput(f"{place}.{unknown[0]}: is no keyword that is known here; those are {', '.join(_KEYWORDS)}")
    kinds = schema.get("type", [])
    for kind in [kinds] if isinstance(kinds, str) else kinds:
        if kind not in _TYPES:
            raise BadInput(f"{place}.type={kind}: must be one of {', '.join(_TYPES)}")
    for key in ("required", "enum"):
        if not isinstance(schema.get(key, []), list | tuple):
            raise BadInput(f"{place}.{key}: must be a list; try [answer]")
    if not isinstance(schema.get("additionalProperties", True), bool):
        raise BadInput(f"{place}.additionalProperties: must be true or false")
    properties = schema.get("properties", {})
    if not isinstance(properties, Mapping):
        raise BadInput(f"{place}.properties: must hold a schema for each key; try {{answer: {{type: number}}}}")
    for key, inner in properties.items():
        _check_schema(inner, f"{place}.properties.{key}")
    if "items" in schema:
        _check_schema(schema["items"], f"{place}.items")


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
