"""Jinja as chat templates expect it: a sandbox with the tags, filters and functions that `transformers` gives them.

A template comes from wherever a tokenizer comes from, so it runs without access to Python beyond its own values.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.parser import Parser

# Noncharacters of Unicode, which no text holds, stand around what a {% generation %} block writes.
_BEGIN_GENERATED = "\ufdd2"
_END_GENERATED = "\ufdd3"
_EDGES = re.compile(f"[{_BEGIN_GENERATED}{_END_GENERATED}]")


class _GenerationTag(Extension):
    """`{% generation %} ... {% endgeneration %}`: what the author of a template says the assistant generates."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_enclose"), [], [], body).set_lineno(line)

    def _enclose(self, caller: Any) -> str:
        return f"{_BEGIN_GENERATED}{caller()}{_END_GENERATED}"


class _PlainNamespace(Namespace):
    """Jinja's namespace without names that reach into Python's objects."""

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace cannot hold the name {name!r}")
        super().__setitem__(name, value)


@lru_cache(maxsize=32)
def compile_template(text: str) -> Template:
    """Compile a chat template. Raises jinja2.TemplateSyntaxError.

    Its date is the variable `now` (a datetime) of the rendering.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["namespace"] = _PlainNamespace
    return environment.from_string(text)


def without_generation_marks(rendered: str) -> tuple[str, list[tuple[int, int]]]:
    """Return a rendering without the marks of generation blocks, and (start, end) of what they write, in characters."""
    if _BEGIN_GENERATED not in rendered:
        return rendered, []
    parts = _EDGES.split(rendered)
    spans, position, begin = [], 0, 0
    for part, edge in zip(parts, _EDGES.findall(rendered), strict=False):
        position += len(part)
        if edge == _BEGIN_GENERATED:
            begin = position
        else:
            spans.append((begin, position))
    return "".join(parts), spans


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON as `transformers` does: Jinja's own filter would escape for HTML and sort the keys."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
