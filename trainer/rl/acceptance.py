"""Rejection sampling: which of the answers to a prompt are accepted, and what is written of them. Pure functions.

Yuan et al. 2023 (arXiv:2308.01825, section 3.3) fine-tune on the right and different ones of k answers to a question.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.data.chat.conversation import Conversation
from trainer.data.chat.messages import CallForm, to_openai

ACCEPTED = "accepted"
FAILED, LOW, CUT, EMPTY = "without a score", "below rft.min_score", "cut by the limit of tokens", "empty"
DOUBLE, BEYOND = "like another", "beyond rft.max_per_prompt"
"""Why an answer is not accepted, in the order in which it is asked; one that was cut would teach to stop there."""


def choose(
    answers: Sequence[Mapping[str, Any]], min_score: float, max_per_prompt: int | None
) -> tuple[list[Mapping[str, Any]], Counter[str]]:
    """Return the accepted ones of the answers to one prompt, in their order, and how many met which end.

    Answers are as `Rollout.record` gives them. Of more than `max_per_prompt` those with the highest scores stay, of
    equal ones the first.
    """
    ends: Counter[str] = Counter()
    different: dict[str, Mapping[str, Any]] = {}
    for answer in sorted(answers, key=lambda one: -one["score"] if one["score"] is not None else float("inf")):
        words = normalise(answer["answers"][-1])
        end = _find_end(answer, words, min_score, different)
        if end is None and max_per_prompt is not None and len(different) == max_per_prompt:
            end = BEYOND
        ends[end or ACCEPTED] += 1
        if end is None:
            different[words] = answer
    return sorted(different.values(), key=lambda one: one["sample"]), ends


def _find_end(answer: Mapping[str, Any], words: str, min_score: float, taken: Mapping[str, Any]) -> str | None:
    if answer["score"] is None:
        return FAILED
    if answer["score"] < min_score:
        return LOW
    if answer["finish"] == "length":
        return CUT
    if not words:
        return EMPTY
    return DOUBLE if words in taken else None


def normalise(text: str) -> str:
    """Return what two answers that are the same have in common: characters in Unicode's NFC, spaces as one each."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def as_chat(conversation: Conversation, answer: str, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row for supervised fine-tuning, in which the answer is the one turn that is trained."""
    messages = to_openai(conversation.messages, CallForm())
    for message in messages:
        if message["role"] == "assistant":
            message["train"] = False
    row: dict[str, Any] = {"messages": [*messages, {"role": "assistant", "content": answer}]}
    if conversation.tools:
        row["tools"] = list(conversation.tools)
    return {**row, "provenance": dict(provenance)}
