"""A JSON array of objects, of any length, as objects or as lines of JSON: what Alpaca's and LLaMA-Factory's files are.

Read a piece at a time; only the element that is being read is in memory.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any

from configs.errors import BadInput, in_one_line

_BLANK = re.compile(r"[ \t\r\n]*")
_MOST_CHARACTERS = 1 << 28  # of one element; more is an error that has not been noticed, such as a quote left open
# A text is all that is taken out of such an element, so a whole number of any length will do as a float.
_ANY_NUMBER = json.JSONDecoder(parse_int=float)


def split_array(pieces: Iterator[bytes], where: str) -> Iterator[bytes]:
    """Yield the objects of the array that `pieces` hold, each on one line. Raises BadInput, naming line and element."""
    for _, text in parse_array(pieces, where, _ANY_NUMBER):
        yield re.sub(r"[\r\n]", " ", text).encode()  # inside its strings a line end is written as \\n


def parse_array(pieces: Iterator[bytes], where: str, decoder: json.JSONDecoder) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the objects of the array that `pieces` hold, each with its JSON. Raises BadInput as `split_array` does."""
    text = _Text(pieces, where, decoder)
    text.skip("[", "an array")
    number = 1
    while text.next_mark() != "]":
        if number > 1:
            text.skip(",", f"a comma or the end of the array after element {number - 1}")
        yield text.take_object(number)
        number += 1
    text.skip("]", "the end of the array")
    if text.next_mark():
        raise BadInput(f"{text.line_at()}: something follows the array; a file holds one array, or an object a line")


class _Text:
    """What of the file has been read and not yet been used."""

    def __init__(self, pieces: Iterator[bytes], where: str, json_decoder: json.JSONDecoder) -> None:
        self._pieces = pieces
        self._where = where
        self._json = json_decoder
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text = ""
        self._at = 0
        self._num_lines = 0  # that ended before `_text` begins

    def line_at(self, at: int | None = None) -> str:
        """Return file and line, from 1, of a place in what is waiting, by default the next."""
        end = self._at if at is None else at
        return f"{self._where}:{self._num_lines + self._text.count('\n', 0, end) + 1}"

    def next_mark(self) -> str:
        """Return the next character that is not blank, empty at the end of the file."""
        while True:
            found = _BLANK.match(self._text, self._at)
            self._at = found.end() if found else self._at
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read_more():
                return ""

    def skip(self, mark: str, what: str) -> None:
        """Go past `mark`."""
        if self.next_mark() != mark:
            raise BadInput(f"{self.line_at()}: not valid JSON: {what} is expected; copy it again, or mend it")
        self._at += 1

    def take_object(self, number: int) -> tuple[dict[str, Any], str]:
        """Return the element `number` of the array, and its JSON."""
        element = f"element {number} of its array"
        if self.next_mark() not in ("{", ""):
            raise BadInput(f"{self.line_at()}: {element} is not a JSON object, as each must be; mend it, or drop it")
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._at)
                break
            except RecursionError as error:
                raise BadInput(f"{self.line_at()}: {element} is nested too deep to be read; drop it") from error
            except json.JSONDecodeError as error:  # it may only not be there yet
                place, reason = error.pos - self._at, error.msg.removesuffix(" at")
                if len(self._text) - self._at <= _MOST_CHARACTERS and self._read_more():
                    continue
            except ValueError as error:  # what the decoder does not take for a number
                place, reason = 0, in_one_line(error)
            where = self.line_at(self._at + place)
            raise BadInput(f"{where}: {element} is not valid JSON ({reason}); mend it, or drop it")
        text = self._text[self._at : end]
        self._at = end
        return value, text

    def _read_more(self) -> bool:
        """Read at least as much again as is waiting, so that a long element is not parsed too often."""
        self._num_lines += self._text.count("\n", 0, self._at)
        waiting = [self._text[self._at :]]
        num_wanted = max(1, len(waiting[0]))
        self._at, num_new = 0, 0
        try:
            while num_new < num_wanted and (piece := next(self._pieces, None)) is not None:
                waiting.append(self._decoder.decode(piece))
                num_new += len(piece)
            if not num_new:
                self._decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise BadInput(f"{self._where}: not UTF-8; convert it to UTF-8 or leave it out") from error
        self._text = "".join(waiting)
        return num_new > 0
