"""A chat template: where it is found (tokenizer directory, .jinja file, name) and how it renders messages.

Knows messages as templates want them (`messages.py`), and no tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from configs.errors import BadInput, in_one_line
from trainer.data.chat.conversation import BadRow
from trainer.data.chat.sandbox import compile_template, without_generation_marks
from trainer.data.tokenizer import find_tokenizer_directory, read_json

NAMED_TEMPLATES = ("chatml", "llama3", "qwen", "mistral", "gemma", "alpaca")
_NAMED_FOLDER = Path(__file__).parent / "named"


@dataclass(frozen=True)
class Rendered:
    """What a template writes."""

    text: str
    generated: list[tuple[int, int]]
    """(start, end) in characters of what its {% generation %} blocks write; empty where it has none."""


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template with the variables of its tokenizer."""

    name: str
    """What messages call it: its name, its file, or that of the tokenizer."""
    text: str
    tool_text: str | None = None
    """The template for conversations with tools, where the tokenizer has one of its own for them (`tool_use`)."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """bos_token, eos_token and the like, as the tokenizer names them."""
    now: datetime = field(default_factory=datetime.now)
    """What `strftime_now` takes for the present: one moment, so that all renderings agree."""

    @property
    def is_tagged(self) -> bool:
        """Whether the template says in {% generation %} blocks what the assistant generates."""
        return "endgeneration" in self.text

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what decides what the template writes, its text and its variables, but for the date of the day.

        A run goes on with the tokens that it began with: those of a later day would be other data.
        """
        content = [self.text, self.tool_text, sorted(self.variables.items())]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> Rendered:
        """Render messages in OpenAI's form. Raises BadRow with what the template says where it refuses them."""
        compiled = compile_template(self.tool_text if tools and self.tool_text else self.text)
        try:
            text = compiled.render(
                messages=messages,
                tools=tools or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                strftime_now=self.now.strftime,
                **{**self.variables, **variables},
            )
        except (
            TemplateError,
            ArithmeticError,
            AttributeError,
            LookupError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            raise BadRow(f"template {self.name} refuses it: {in_one_line(error)}") from error
        return Rendered(*without_generation_marks(text))


def load_template(
    name_or_path: str | None, tokenizer_dir: str | os.PathLike[str], field: str = "sft.template"
) -> ChatTemplate:
    """Load the chat template of that name or .jinja file, or with None the tokenizer's own. Raises BadInput.

    The tokenizer's is looked for where `transformers` keeps it: chat_template.jinja, tokenizer_config.json,
    chat_template.json. Reads no network.
    """
    directory = find_tokenizer_directory(Path(tokenizer_dir))
    tool_text = None
    if name_or_path is None:
        name = f"of {directory}"
        text, tool_text = _texts_of_tokenizer(directory, field)
    elif name_or_path in NAMED_TEMPLATES:
        name = name_or_path
        text = (_NAMED_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    else:
        name = name_or_path
        text = _read_template(Path(name_or_path), field)
    for source in (text, tool_text):
        _check_syntax(source, name, field)
    return ChatTemplate(name, text, tool_text, _token_variables(directory))


def _read_template(file: Path, field: str) -> str:
    if not file.is_file():
        names = ", ".join(NAMED_TEMPLATES)
        raise BadInput(f"{field}: {file} is neither the name of a template ({names}) nor a .jinja file that exists")
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{field}: {file} is not UTF-8 text ({in_one_line(error)}); name a .jinja file") from error


def _texts_of_tokenizer(directory: Path, field: str) -> tuple[str, str | None]:
    """Return the tokenizer's template and, where it has one, that for conversations with tools."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        tool_file = directory / "additional_chat_templates" / "tool_use.jinja"
        return _read_template(file, field), _read_template(tool_file, field) if tool_file.is_file() else None
    for name in ("tokenizer_config.json", "chat_template.json"):
        found = read_json(directory / name).get("chat_template")
        if isinstance(found, str):
            return found, None
        by_name = _by_name(found)
        if "default" in by_name:
            return by_name["default"], by_name.get("tool_use")
        if by_name:
            raise BadInput(
                f"{field}: {directory / name} has the chat templates {', '.join(sorted(by_name))} and no default; "
                f"copy the right one into a file and name it, or set {field} to chatml"
            )
    raise BadInput(
        f"{field}: the tokenizer in {directory} has no chat template and none is named; "
        f"set {field} to one of {', '.join(NAMED_TEMPLATES)} or to a .jinja file"
    )


def _by_name(found: Any) -> dict[str, str]:
    """Read templates kept as a list of name and template, or as a mapping."""
    if isinstance(found, dict):
        return {name: text for name, text in found.items() if isinstance(text, str)}
    if isinstance(found, list):
        return {entry["name"]: entry["template"] for entry in found if {"name", "template"} <= entry.keys()}
    return {}


def _check_syntax(text: str | None, name: str, field: str) -> None:
    try:
        compile_template(text or "")
    except TemplateSyntaxError as error:
        raise BadInput(
            f"{field}: template {name} is not valid Jinja (line {error.lineno}: {in_one_line(error)}); mend it, "
            f"or set {field} to one of {', '.join(NAMED_TEMPLATES)}"
        ) from error


def _token_variables(directory: Path) -> dict[str, str]:
    """Return the tokens that the tokenizer's files give a name, such as eos_token."""
    variables: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        for key, token in read_json(directory / name).items():
            token = token.get("content") if isinstance(token, dict) else token
            if key.endswith("_token") and isinstance(token, str):
                variables[key] = token
    return variables
