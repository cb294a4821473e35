"""Rows of preferences as conversations: chosen and rejected answers, ranked lists, and single answers with a label.

Read as TRL (dataset formats: explicit and implicit prompts, unpaired preference) and LLaMA-Factory (data/README.md)
read them. Torch-free; opens no file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from configs.sections.sft import ConversationSource
from trainer.data.chat.conversation import BadRow, Conversation, Message
from trainer.data.chat.forms import as_conversation, parse_conversation, parse_prompt, parse_turns
from trainer.data.chat.tool_json import describe
from trainer.data.chat.turn_forms import check_order, check_text

_EXPECTED = "expected are chosen and rejected, or ranked, beside a prompt, messages, conversations or instruction"


@dataclass(frozen=True)
class Judged:
    """An answer to a prompt, alone."""

    prompt: Conversation
    answer: tuple[Message, ...]
    is_good: bool

    @property
    def whole(self) -> Conversation:
        """The prompt, of which nothing is trained, and the answer behind it."""
        return answered(self.prompt, self.answer)


@dataclass(frozen=True)
class Pair:
    """Two answers to a prompt, of which one is better."""

    chosen: Conversation
    rejected: Conversation
    margin: float = 0.0
    """By how much it is better, where the data says so."""


def answered(prompt: Conversation, answer: Sequence[Message]) -> Conversation:
    """Return the conversation of a prompt, of which nothing is trained, and an answer."""
    context = tuple(replace(message, is_trained=False) for message in prompt.messages)
    return replace(prompt, messages=(*context, *answer))


def parse_pairs(row: Mapping[str, Any], source: ConversationSource, path: str, number: int) -> list[Pair]:
    """Read a row as one pair, or as one for every two of a ranked list that are not of one rank. Raises BadRow."""
    chosen, rejected, ranked = (source.columns.get(name, name) for name in ("chosen", "rejected", "ranked"))
    margin = source.columns.get("margin", "margin")
    given = row.get(margin)
    if given is not None and not _is_number(given):
        raise BadRow(f"{margin} is {given!r}; give a number, by how much the chosen answer is better, or leave it out")
    if row.get(ranked) is not None:
        if given is not None:
            raise BadRow(f"{margin} stands beside {ranked}, which makes several pairs; leave it out")
        return _parse_ranked(row, source, path, number)
    row = {name: value for name, value in row.items() if name != margin}
    for name in (chosen, rejected):
        if row.get(name) is None:
            there = ", ".join(row) or "none"
            raise BadRow(f"no preference in its columns {there}: {name} is missing; {_EXPECTED}; name yours in columns")
    prompt, answers = _parse_both(row, source, path, number)
    if answers[0] == answers[1]:
        raise BadRow(f"{chosen} and {rejected} are equal, and such a pair says nothing; drop the row")
    return [Pair(answered(prompt, answers[0]), answered(prompt, answers[1]), float(given or 0.0))]


def parse_judged(row: Mapping[str, Any], source: ConversationSource, path: str, number: int) -> list[Judged]:
    """Read a row as an answer with a label, or a pair as two of them, the chosen one good. Raises BadRow."""
    label = source.columns.get("label", "label")
    if label not in row and row.get(source.columns.get("chosen", "chosen")) is not None:
        prompt, (chosen, rejected) = _parse_both(row, source, path, number)
        return [Judged(prompt, chosen, True), Judged(prompt, rejected, False)]
    if label not in row:
        raise BadRow(
            f"no label in its columns {', '.join(row) or 'none'}; give {label}, true or false, or name yours in "
            "columns, such as columns: {label: kto_tag}"
        )
    if not isinstance(row[label], bool):
        raise BadRow(
            f"{label} is {row[label]!r}, neither true nor false; write true where the answer is good, or false"
        )
    whole = parse_conversation(row, source, path, number)
    messages = whole.messages
    last = max(place for place, message in enumerate(messages) if message.role == "assistant")
    if not last:
        raise BadRow("begins with the answer; put the question before it")
    return [Judged(replace(whole, messages=messages[:last]), messages[last : last + 1], row[label])]


def _parse_both(
    row: Mapping[str, Any], source: ConversationSource, path: str, number: int
) -> tuple[Conversation, tuple[tuple[Message, ...], tuple[Message, ...]]]:
    """Return the prompt of a pair, and its chosen and rejected answer."""
    names = [source.columns.get(name, name) for name in ("chosen", "rejected")]
    rest = {name: value for name, value in row.items() if name not in names}
    chosen, rejected = (_parse_answer(row.get(name), name, source) for name in names)
    if isinstance(chosen, str) or isinstance(rejected, str) or chosen[0].role == rejected[0].role == "assistant":
        given = source.columns.get("prompt", "prompt")
        if set(rest) <= {given} and rest.get(given) is None and isinstance(chosen, str) and isinstance(rejected, str):
            return _split_text(chosen, rejected, names, path, number)
        return _parse_context(rest, source, path, number), (_as_turns(chosen, names[0]), _as_turns(rejected, names[1]))
    shared = _count_shared(chosen, rejected)
    if not shared:
        raise BadRow(f"{names[0]} and {names[1]} begin with different turns, and so answer different questions")
    answers = []
    for name, turns in zip(names, (chosen, rejected), strict=True):
        if not any(message.role == "assistant" for message in turns[shared:]):
            raise BadRow(f"{name} has no answer behind the {shared} turns that both share; give one, or drop the row")
        answers.append(tuple(turns[shared:]))
    prompt = as_conversation(row, list(chosen[:shared]), source.columns, path, number)
    return prompt, (answers[0], answers[1])


def _parse_context(rest: Mapping[str, Any], source: ConversationSource, path: str, number: int) -> Conversation:
    prompt, answer = parse_prompt(rest, source, path, number)
    if answer is not None:
        raise BadRow("its prompt ends with an answer, beside those that are compared; end it with the user's turn")
    return prompt


def _parse_answer(value: Any, name: str, source: ConversationSource) -> str | tuple[Message, ...]:
    """Return an answer as text, or as the turns that it is or that lead to it."""
    if isinstance(value, str):
        if not check_text(value, name).strip():
            raise BadRow(f"{name} is empty, an answer that says nothing; drop the row")
        return value
    turns = [value] if isinstance(value, dict) else value
    if not isinstance(turns, list):
        raise BadRow(f"{name} is {describe(value)}; give the answer as text, as a turn, or as a list of turns")
    if not turns:
        raise BadRow(f"{name} is empty, an answer that says nothing; drop the row")
    messages = parse_turns(turns, name, source.columns, source.roles)
    check_order(messages, name)
    return tuple(messages)


def _as_turns(answer: str | tuple[Message, ...], name: str) -> tuple[Message, ...]:
    if isinstance(answer, str):
        return (Message("assistant", answer),)
    if answer[0].role != "assistant":
        raise BadRow(f"{name} begins with a turn of the {answer[0].role}, where its answer is to stand alone")
    return answer


def _split_text(
    chosen: str, rejected: str, names: Sequence[str], path: str, number: int
) -> tuple[Conversation, tuple[tuple[Message, ...], tuple[Message, ...]]]:
    """Return what two texts have in common from their beginning as the prompt, and the rest as answers, as TRL."""
    shared = _count_shared(chosen, rejected)
    while shared and not chosen[shared - 1].isspace():  # a word that both begin alike is the answers'
        shared -= 1
    prompt, answers = chosen[:shared].strip(), (chosen[shared:].strip(), rejected[shared:].strip())
    if chosen != rejected and (not prompt or not all(answers)):
        raise BadRow(
            f"no prompt, and {names[0]} and {names[1]} have no beginning in common that could be one; give prompt"
        )
    asked = Conversation((Message("user", prompt),), (), path, number)
    return asked, ((Message("assistant", answers[0]),), (Message("assistant", answers[1]),))


def _count_shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _parse_ranked(row: Mapping[str, Any], source: ConversationSource, path: str, number: int) -> list[Pair]:
    ranked, column = (source.columns.get(name, name) for name in ("ranked", "scores"))
    found = row[ranked]
    if not isinstance(found, list) or len(found) < 2:
        raise BadRow(f"{ranked} is {describe(found)}; give a list of two answers or more, the best first")
    scores = row.get(column)
    if scores is None:
        scores = range(len(found), 0, -1)
    elif not isinstance(scores, list) or len(scores) != len(found) or not all(map(_is_number, scores)):
        raise BadRow(f"{column} does not hold a number for each of the {len(found)} answers in {ranked}")
    rest = {name: value for name, value in row.items() if name not in (ranked, column)}
    prompt = _parse_context(rest, source, path, number)
    answers = [_as_turns(_parse_answer(answer, f"{ranked}[{i}]", source), ranked) for i, answer in enumerate(found)]
    pairs = list(_compare(prompt, answers, list(scores)))
    if not pairs:
        raise BadRow(f"the answers in {ranked} are all equal or of one score, and say nothing; drop the row")
    return pairs


def _compare(prompt: Conversation, answers: Sequence[tuple[Message, ...]], scores: Sequence[float]) -> Iterator[Pair]:
    """Yield a pair for every two answers that differ and are not of one score."""
    for one, other in combinations(range(len(answers)), 2):
        better, worse = (one, other) if scores[one] > scores[other] else (other, one)
        if scores[better] > scores[worse] and answers[better] != answers[worse]:
            yield Pair(answered(prompt, answers[better]), answered(prompt, answers[worse]))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
