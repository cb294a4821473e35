"""Rows of the forms that data sets of chats have, recognised by their columns, as conversations.

OpenAI's `messages`, ShareGPT's `conversations`, Alpaca's `instruction`, `input`, `output`, and TRL's `prompt` and
`completion`, read as LLaMA-Factory (data/README.md) and TRL (dataset formats) read them. Torch-free; opens no file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
        _refuse_media(row)
        _refuse_preference(row, columns)
    form, column = _find_form(row, columns)
    messages = _parse_form(row, form, columns, source.roles, needs_answer=True)
    check_order(messages, column)
    return as_conversation(row, messages, columns, path, number)


def parse_prompt(
    row: Mapping[str, Any], source: ConversationSource, path: str = "", number: int = 0
) -> tuple[Conversation, Any]:
    """Read a row as a conversation that the assistant answers next, and the answer that it has; None where it has none.

    Forms are those of `parse_conversation`, with the last turn of the assistant taken off where one ends the
    conversation; output and completion may be empty or missing. The answer is its text, or the whole turn as the row
    has it where it holds more, such as calls. Raises BadRow.
    """
    columns = _name_columns(source.columns)
    _refuse_media(row)
    form, column = _find_form(row, columns, needs_answer=False)
    messages = _parse_form(row, form, columns, source.roles, needs_answer=False)
    check_order(messages, column, needs_answer=False)
    answer: Any = None
    if messages and messages[-1].role == "assistant":
        last, turns = messages.pop(), row.get(column) or row.get(columns.get("prompt", "prompt"))
        answer = last.content
        if last != Message("assistant", answer):
            answer = turns[-1] if isinstance(turns, list) else turns
    if not messages or messages[-1].role in ("assistant", "system"):
        raise BadRow("holds no turn to answer; end with the user's, or with its answer behind it")
    if messages[-1].role == "user" and not messages[-1].content.strip():
        raise BadRow("its last turn, the user's, is empty and asks nothing; drop the row")
    return as_conversation(row, messages, columns, path, number), answer


def _parse_form(
    row: Mapping[str, Any],
    form: str,
    columns: Mapping[str, str],
    roles: Mapping[str, ChatRole],
    *,
    needs_answer: bool,
) -> list[Message]:
    if form == "output":
        return list(_parse_instruction(row, columns, needs_answer=needs_answer))
    if form == "completion":
        return _parse_completion(row, columns, roles, needs_answer=needs_answer)
    column = columns.get(form, form)
    return parse_turns(row[column], column, columns, roles)


def as_conversation(
    row: Mapping[str, Any], messages: list[Message], columns: Mapping[Any, str], path: str, number: int
) -> Conversation:
    """Return the messages with what columns beside them say: the system prompt and the tools. Raises BadRow."""
    system = row.get(columns.get("system", "system"))
    if system and messages[0].role != "system":
        messages.insert(0, Message("system", check_text(system, "the system prompt")))
    tools = row.get(columns.get("tools", "tools"))
    return Conversation(tuple(messages), parse_tools(tools) if tools else (), path, number)


def _name_columns(columns: Mapping[Any, str]) -> Mapping[str, str]:
    """Return the columns by our names: LLaMA-Factory's prompt, query and response are those of Alpaca."""
    if "query" in columns or "response" in columns:
        return {_LLAMA_FACTORY.get(name, name): column for name, column in columns.items()}
    return columns


def _find_form(row: Mapping[str, Any], columns: Mapping[str, str], *, needs_answer: bool = True) -> tuple[str, str]:
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
    if not needs_answer:
        for answer, question in _FORMS:
            if row.get(columns.get(question, question)) is not None:
                return answer, columns.get(answer, answer)
        texts = [name for name, value in row.items() if isinstance(value, str)]
        raise BadRow(
            f"nothing to answer in its columns {_columns_of(row)}; expected are prompt, or messages, or conversations, "
            f"or instruction; call yours prompt, or name it in a recipe: columns: "
            f"{{prompt: {texts[0] if texts else 'question'}}}"
        )
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


def _refuse_media(row: Mapping[str, Any]) -> None:
    """Refuse rows that hold more than text."""
    for name in sorted(MEDIA & row.keys()):
        if row[name]:
            raise BadRow(f"column {name!r} is not empty, and only text is learnt here; drop the row, or the column")


def _refuse_preference(row: Mapping[str, Any], columns: Mapping[str, str]) -> None:
    """Refuse rows of which only a part would be learnt."""
    if row.keys() >= _PREFERENCE and _PREFERENCE.isdisjoint(columns.values()):
        asked = next((name for name in ("conversations", "messages", "prompt") if name in row), None)
        answer = "output: chosen" if "instruction" in row else "messages: chosen"
        advice = f"prompt: {asked}, completion: chosen" if asked else answer
        raise BadRow(f"a preference of chosen over rejected, and SFT learns one: name it, e.g. columns: {{{advice}}}")


def parse_turns(turns: Any, where: str, columns: Mapping[Any, str], roles: Mapping[str, ChatRole]) -> list[Message]:
    """Read a list of turns, which `where` names. Raises BadRow."""
    if not isinstance(turns, list):
        raise BadRow(f"{where} is {describe(turns)}, not a list of turns; write [{{role: ..., content: ...}}, ...]")
    messages = []
    for number, turn in enumerate(turns):
        try:
            messages.append(parse_turn(turn, columns, roles))
        except BadRow as error:
            raise BadRow(f"{where}[{number}]: {error}") from error
    return messages


def _parse_instruction(row: Mapping[str, Any], columns: Mapping[str, str], *, needs_answer: bool) -> Iterator[Message]:
    """Yield the turns of a row of Alpaca's form: history, instruction and input on lines of their own, output."""
    history = row.get(columns.get("history", "history")) or []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRow(f"history holds {describe(pair)} where a pair [question, answer] is expected")
        yield Message("user", check_text(pair[0], "a question in history"))
        yield _answer(pair[1], "an answer in history")
    names = [columns.get(name, name) for name in ("instruction", "input")]
    asked = [check_text(row[name], name) for name in names if row.get(name) is not None]
    yield Message("user", "\n".join(text for text in asked if text))
    output = columns.get("output", "output")
    if needs_answer or row.get(output):
        yield _answer(row[output], output)


def _answer(text: Any, what: str) -> Message:
    if not check_text(text, what).strip():
        raise BadRow(f"{what} is empty, an assistant's turn that says nothing; drop the row")
    return Message("assistant", text)


def _parse_completion(
    row: Mapping[str, Any], columns: Mapping[str, str], roles: Mapping[str, ChatRole], *, needs_answer: bool
) -> list[Message]:
    """Return the turns of a prompt and its completion, both texts or both lists of turns."""
    names = columns.get("prompt", "prompt"), columns.get("completion", "completion")
    prompt, completion = (row.get(name) for name in names)
    if not needs_answer and not completion:
        if isinstance(prompt, str):
            return [Message("user", check_text(prompt, names[0]))]
        return parse_turns(prompt, names[0], columns, roles)
    if isinstance(prompt, str) and isinstance(completion, str):
        return [Message("user", check_text(prompt, names[0])), _answer(completion, names[1])]
    completion = [completion] if isinstance(completion, dict) else completion
    if not isinstance(prompt, list) or not isinstance(completion, list):
        kinds = f"{names[0]} is {describe(prompt)} and {names[1]} {describe(completion)}"
        raise BadRow(f"{kinds}; give both as text, or both as lists of turns")
    context = parse_turns(prompt, names[0], columns, roles)
    answer = parse_turns(completion, names[1], columns, roles)
    if not any(message.role == "assistant" for message in answer):
        raise BadRow(f"{names[1]}: no turn of the assistant in it, and so nothing to learn")
    return [replace(message, is_trained=False) for message in context] + answer
