"""Rows of the forms that data sets of chats have, recognised by their columns, as conversations.

OpenAI's `messages`, ShareGPT's `conversations`, Alpaca's `instruction`, `input`, `output`, and TRL's `prompt` and
`completion`, read as LLaMA-Factory (data/README.md) and TRL (dataset formats) read them. Torch-free; opens no file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from configs.sections.sft import ChatRole, ConversationSource
from trainer.data.chat.conversation import BadRow, Conversation, Message
from trainer.data.chat.tool_json import describe, parse_tools
from trainer.data.chat.turn_forms import MEDIA, check_order, check_text, parse_turn

# Columns that a row of a form has; the first must not be null.
_FORMS = (
    ("messages", "messages"),
    ("conversations", "conversations"),
    ("output", "instruction"),
    ("output", "input"),
    ("completion", "prompt"),
)
_DECIDING = {name for form in _FORMS for name in form}
_LLAMA_FACTORY = {"prompt": "instruction", "query": "input", "response": "output"}
_PREFERENCE = {"chosen", "rejected"}
_TELLING = MEDIA | _PREFERENCE


def parse_conversation(
    row: Mapping[str, Any], source: ConversationSource, path: str = "", number: int = 0
) -> Conversation:
    """Read a row as a conversation, in the form that its columns, or the source's, name.

    Of several forms in a row the first of messages, conversations, output, completion counts. Turns of a `prompt` that
    is a list are context and not trained, as in TRL; answers in `history` are trained, as in LLaMA-Factory, and a turn
    of the system goes before the column `system`. `path` and `number` are the row's file and place. Raises BadRow.
    """
    columns = _name_columns(source.columns)
    if not _TELLING.isdisjoint(row):
        _refuse_by_columns(row, columns)
    form, column = _find_form(row, columns)
    if form == "output":
        messages = list(_parse_instruction(row, columns))
    elif form == "completion":
        messages = _parse_completion(row, columns, source.roles)
    else:
        messages = _parse_turns(row[column], column, columns, source.roles)
    check_order(messages, column)
    system = row.get(columns.get("system", "system"))
    if system and messages[0].role != "system":
        messages.insert(0, Message("system", check_text(system, "the system prompt")))
    tools = row.get(columns.get("tools", "tools"))
    return Conversation(tuple(messages), parse_tools(tools) if tools else (), path, number)


def parse_prompt(row: Mapping[str, Any], source: ConversationSource, path: str = "", number: int = 0) -> Conversation:
    """Read of a row what is to be answered: a conversation without the turns of the assistant that end it.

    The forms are those of `parse_conversation`, of which the answer may be missing, so that a column `prompt`, text or
    turns, is enough. Raises BadRow.
    """
    columns = _name_columns(source.columns)
    messages = list(_parse_question(row, columns, source.roles))
    while messages and messages[-1].role == "assistant":
        messages.pop()
    if not any(message.role == "user" for message in messages):
        raise BadRow("no turn of the user that could be answered; give a prompt, or turns that end with the user's")
    system, tools = (row.get(columns.get(name, name)) for name in ("system", "tools"))
    if system and messages[0].role != "system":
        messages.insert(0, Message("system", check_text(system, "the system prompt")))
    return Conversation(tuple(messages), parse_tools(tools) if tools else (), path, number)


def _parse_question(
    row: Mapping[str, Any], columns: Mapping[str, str], roles: Mapping[str, ChatRole]
) -> Sequence[Message]:
    for name in ("prompt", "messages", "conversations", "instruction"):
        column = columns.get(name, name)
        if row.get(column) is None:
            if name in columns:
                raise BadRow(f"no column {column!r}, which columns.{name} names; there are {_columns_of(row)}")
        elif name == "instruction":
            return _parse_asked(row, columns)
        elif name == "prompt" and isinstance(row[column], str):
            return [Message("user", check_text(row[column], column))]
        else:
            return _parse_turns(row[column], column, columns, roles)
    texts = [name for name, value in row.items() if isinstance(value, str)]
    raise BadRow(
        f"no prompt in its columns {_columns_of(row)}; expected are prompt, messages, conversations or instruction; "
        f"name yours, e.g. columns: {{prompt: {texts[0] if texts else 'question'}}}"
    )


def _name_columns(columns: Mapping[Any, str]) -> Mapping[str, str]:
    """Return the columns by our names: LLaMA-Factory's prompt, query and response are those of Alpaca."""
    if "query" in columns or "response" in columns:
        return {_LLAMA_FACTORY.get(name, name): column for name, column in columns.items()}
    return columns


def _find_form(row: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[str, str]:
    """Return the form of a row by the column that decides, in our name and in the file's."""
    named = [name for name in columns if name in _DECIDING]
    for name in named:
        if columns[name] not in row:
            raise BadRow(f"no column {columns[name]!r}, which columns.{name} names; there are {_columns_of(row)}")
    for answer, question in _FORMS:
        column = columns.get(answer, answer)
        if row.get(column) is not None and columns.get(question, question) in row:
            if not named or answer in named or question in named:
                return answer, column
    raise BadRow(
        f"no conversation in its columns {_columns_of(row)}; expected are messages, or conversations, or instruction "
        f"and output, or prompt and completion; {_advise(row)}"
    )


def _columns_of(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} (null)" if value is None else name for name, value in row.items()) or "none"


def _advise(row: Mapping[str, Any]) -> str:
    """Return what would make such a row readable, as far as its values tell."""
    lists = {name: value[0] for name, value in row.items() if isinstance(value, list) and value}
    texts = [name for name, value in row.items() if isinstance(value, str)]
    turns = [
        name for name, first in lists.items() if isinstance(first, dict) and not {"role", "from"}.isdisjoint(first)
    ]
    if turns:
        return f"name yours, e.g. columns: {{messages: {turns[0]}}}"
    if lists and len(row) == 1:
        return f"if its rows are in {next(iter(lists))!r}, write that list alone to the file"
    first, last = (texts[0], texts[1]) if len(texts) > 1 else ("question", "answer")
    return f"name yours, e.g. columns: {{prompt: {first}, completion: {last}}}"


def _refuse_by_columns(row: Mapping[str, Any], columns: Mapping[str, str]) -> None:
    """Refuse rows that hold more than text, or of which only a part would be learnt."""
    for name in sorted(MEDIA & row.keys()):
        if row[name]:
            raise BadRow(f"column {name!r} is not empty, and only text is learnt here; drop the row, or the column")
    if row.keys() >= _PREFERENCE and _PREFERENCE.isdisjoint(columns.values()):
        asked = next((name for name in ("conversations", "messages", "prompt") if name in row), None)
        answer = "output: chosen" if "instruction" in row else "messages: chosen"
        advice = f"prompt: {asked}, completion: chosen" if asked else answer
        raise BadRow(f"a preference of chosen over rejected, and SFT learns one: name it, e.g. columns: {{{advice}}}")


def _parse_turns(turns: Any, where: str, columns: Mapping[str, str], roles: Mapping[str, ChatRole]) -> list[Message]:
    if not isinstance(turns, list):
        raise BadRow(f"{where} is {describe(turns)}, not a list of turns; write [{{role: ..., content: ...}}, ...]")
    messages = []
    for number, turn in enumerate(turns):
        try:
            messages.append(parse_turn(turn, columns, roles))
        except BadRow as error:
            raise BadRow(f"{where}[{number}]: {error}") from error
    return messages


def _parse_instruction(row: Mapping[str, Any], columns: Mapping[str, str]) -> Iterator[Message]:
    """Yield the turns of a row of Alpaca's form: history, instruction and input on lines of their own, output."""
    yield from _parse_asked(row, columns)
    output = columns.get("output", "output")
    yield _answer(row[output], output)


def _parse_asked(row: Mapping[str, Any], columns: Mapping[str, str]) -> list[Message]:
    """Return the turns of a row of Alpaca's form but its output."""
    messages: list[Message] = []
    history = row.get(columns.get("history", "history")) or []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRow(f"history holds {describe(pair)} where a pair [question, answer] is expected")
        messages.append(Message("user", check_text(pair[0], "a question in history")))
        messages.append(_answer(pair[1], "an answer in history"))
    names = [columns.get(name, name) for name in ("instruction", "input")]
    asked = [check_text(row[name], name) for name in names if row.get(name) is not None]
    return [*messages, Message("user", "\n".join(text for text in asked if text))]


def _answer(text: Any, what: str) -> Message:
    if not check_text(text, what).strip():
        raise BadRow(f"{what} is empty, an assistant's turn that says nothing; drop the row")
    return Message("assistant", text)


def _parse_completion(
    row: Mapping[str, Any], columns: Mapping[str, str], roles: Mapping[str, ChatRole]
) -> list[Message]:
    """Return the turns of a prompt and its completion, both texts or both lists of turns."""
    names = columns.get("prompt", "prompt"), columns.get("completion", "completion")
    prompt, completion = (row[name] for name in names)
    if isinstance(prompt, str) and isinstance(completion, str):
        return [Message("user", check_text(prompt, names[0])), _answer(completion, names[1])]
    completion = [completion] if isinstance(completion, dict) else completion
    if not isinstance(prompt, list) or not isinstance(completion, list):
        kinds = f"{names[0]} is {describe(prompt)} and {names[1]} {describe(completion)}"
        raise BadRow(f"{kinds}; give both as text, or both as lists of turns")
    context = _parse_turns(prompt, names[0], columns, roles)
    answer = _parse_turns(completion, names[1], columns, roles)
    if not any(message.role == "assistant" for message in answer):
        raise BadRow(f"{names[1]}: no turn of the assistant in it, and so nothing to learn")
    return [replace(message, is_trained=False) for message in context] + answer
