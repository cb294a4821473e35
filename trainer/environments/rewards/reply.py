"""What a reward function is given, and how the functions of this folder find the final answer in it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Reply:
    """An answer of the policy and what it answers."""

    text: str
    """Without its end-of-turn token."""
    row: Mapping[str, Any]
    """The row of the data that the prompt comes from, with all its columns."""
    messages: Sequence[Mapping[str, Any]]
    """The conversation that it answers; each message has `role` and `content`."""
    num_tokens: int
    """Of the answer, its end-of-turn token included."""
    max_new_tokens: int
    """Tokens that an answer may have."""
    is_cut: bool
    """It was ended by that limit."""


_OPENING_TAG = re.compile(r"<([A-Za-z]\w*)>")


def final_answer(text: str, after: str) -> str | None:
    """Return what follows the last `after` in a text, the whole for "", None where it is not there.

    Of an opening tag such as <answer>, what stands between it and its closing tag, which must be there too.
    """
    if not after:
        return text
    _, found, final = text.rpartition(after)
    if not found:
        return None
    tag = _OPENING_TAG.fullmatch(after)
    if tag is None:
        return final
    inside, closed, _ = final.partition(f"</{tag[1]}>")
    return inside if closed else None
