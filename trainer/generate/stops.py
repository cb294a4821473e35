"""Where an answer ends: stop tokens, stop strings and its length. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

Finish = Literal["stop_token", "stop_string", "length"]
Decode = Callable[[Sequence[int]], str]

_UNSURE = 4
"""Characters at the front of a piece of an answer that its decoding may lack or have wrong: a space, a cut letter."""


def find_stop_string(ids: Sequence[int], stops: Sequence[str], decode: Decode) -> str | None:
    """Return the stop string that the last of `ids` has completed, if any; `decode` shows special tokens too.

    Only as much of the end is decoded as such a string can reach back.
    """
    longest = max(map(len, stops), default=0)
    if longest == 0:
        return None
    size = longest
    while True:
        text = decode(ids[-size:])
        if size >= len(ids) or len(text) >= longest + len(decode(ids[-1:])) + _UNSURE:
            break
        size *= 2
    return next((stop for stop in stops if stop in text), None)


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """Return the text before the first stop string."""
    places = [place for place in (text.find(stop) for stop in stops) if place >= 0]
    return text[: min(places)] if places else text
