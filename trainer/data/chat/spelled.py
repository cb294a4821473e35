"""Chat tokens that a conversation's own text spells: marked before rendering, so that no text can forge an end of turn.

Unicode's noncharacters serve as marks; tokens that are marked are later encoded as characters.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.data.chat.conversation import BadRow

_BEGIN = "\ufdd0"
_END = "\ufdd1"
_MARKS = re.compile(f"[{_BEGIN}{_END}]")
_ALL_MARKS = re.compile("[\ufdd0-\ufdd3]")


@dataclass(frozen=True)
class Unmarked:
    """A text without its marks."""

    text: str
    cuts: tuple[int, ...]
    """Character positions inside spelled tokens; a text tokenised in pieces cut there cannot hold them as tokens."""
    marks: tuple[int, ...]
    """Where the marks stood in the marked text."""

    def position(self, marked: int) -> int:
        """Return where a position of the marked text lies in this one."""
        return marked - bisect_left(self.marks, marked)


def spells(value: Any, control: re.Pattern[str]) -> bool:
    """Return whether any text in a JSON value spells a control token. Raises BadRow for text that holds our marks."""
    if isinstance(value, str):
        if _ALL_MARKS.search(value):
            raise BadRow("a text holds the noncharacters U+FDD0 to U+FDD3, which no text may; take them out")
        return control.search(value) is not None
    if isinstance(value, Mapping):
        if any([spells(key, control) for key in value]):
            raise BadRow("the name of a parameter spells a chat token; rename it")
        return any([spells(item, control) for item in value.values()])
    if isinstance(value, list | tuple):
        return any([spells(item, control) for item in value])
    return False


def mark(value: Any, control: re.Pattern[str]) -> Any:
    """Return a JSON value in whose texts every control token stands between marks. Keys are left as they are."""
    if isinstance(value, str):
        return control.sub(lambda match: f"{_BEGIN}{match[0]}{_END}", value)
    if isinstance(value, Mapping):
        return {key: mark(item, control) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [mark(item, control) for item in value]
    return value


def unmark(text: str) -> Unmarked:
    """Take the marks out of a rendering."""
    if _BEGIN not in text and _END not in text:
        return Unmarked(text, (), ())
    marks = tuple(match.start() for match in _MARKS.finditer(text))
    plain = _MARKS.sub("", text)
    # Behind the first character of each: what is left of it on either side is no token any more.
    cuts = {position - order + 1 for order, position in enumerate(marks) if text[position] == _BEGIN}
    return Unmarked(plain, tuple(sorted(cut for cut in cuts if cut < len(plain))), marks)
