"""Texts with spans become token ids with spans of tokens, tokenised as at inference: prompt and answer apart."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from tokenizers import Encoding
from tokenizers import Tokenizer as Backend


@dataclass(frozen=True)
class Tokens:
    """Token ids with the characters they stand for."""

    ids: list[int]
    starts: list[int]
    """First character of each token."""
    ends: list[int]
    """Character behind each token."""

    def first_from(self, position: int) -> int:
        """Return the first token that begins at a character or behind it."""
        return bisect_left(self.starts, position)

    def is_inside_token(self, position: int) -> bool:
        """Return whether a token begins before a character and ends behind it."""
        before = self.first_from(position) - 1
        return before >= 0 and self.ends[before] > position


class SpanTokenizer:
    """Tokenises renderings of chat templates: chat tokens are tokens, and nothing is put in front."""

    def __init__(self, backend: Backend, frame_tokens: Sequence[str]):
        # A copy: the product's tokenizers read special tokens as characters, renderings are full of them.
        self._backend = Backend.from_str(backend.to_str())
        self._backend.encode_special_tokens = False
        self._backend.no_truncation()
        self._backend.no_padding()
        self._frame_tokens = tuple(frame_tokens)
        self._line_break = self._backend.encode("\n", add_special_tokens=False).ids
        self._tails: dict[str, list[int]] = {}

    def encode_batch(self, texts: Sequence[str], cuts: Sequence[Sequence[int]]) -> list[Tokens]:
        """Encode texts, each in pieces cut at the characters given (most at none)."""
        whole = [text for text, cut in zip(texts, cuts, strict=True) if not cut]
        encodings = iter(self._backend.encode_batch(whole, add_special_tokens=False))
        return [
            self.encode_pieces(text, cut) if cut else _tokens(next(encodings))
            for text, cut in zip(texts, cuts, strict=True)
        ]

    def encode_pieces(self, text: str, cuts: Sequence[int]) -> Tokens:
        """Encode a text in pieces, so that no token spans a cut."""
        result = Tokens([], [], [])
        for begin, end in pairwise([0, *cuts, len(text)]):
            piece = self._encode_inside(text[begin:end]) if begin else _tokens(self._encode(text[:end]))
            result.ids.extend(piece.ids)
            result.starts.extend(begin + start for start in piece.starts)
            result.ends.extend(begin + stop for stop in piece.ends)
        return result

    def find_split_prompts(self, text: str, tokens: Tokens, starts: Sequence[int], cuts: Sequence[int]) -> list[int]:
        """Return the ends of prompts, in characters, at which the tokens are not those of the prompt alone.

        Either a token spans prompt and answer, or the answer changes how the prompt's last words are tokenised.
        """
        return [start for start in starts if start and self._is_split(text, tokens, start, cuts)]

    def _is_split(self, text: str, tokens: Tokens, start: int, cuts: Sequence[int]) -> bool:
        if start in cuts:
            return False
        if tokens.is_inside_token(start):
            return True
        # Tokenizers treat what lies between two added tokens by itself: the words since the last one decide.
        begin = max([0, *(text.rfind(token, 0, start) for token in self._frame_tokens)])
        if any(begin < cut < start for cut in cuts):
            return False
        tail = text[begin:start]
        return self._ids_of_tail(tail) != tokens.ids[tokens.first_from(begin) : tokens.first_from(start)]

    def _ids_of_tail(self, tail: str) -> list[int]:
        if len(tail) > 64:  # the question itself, seen once
            return self._encode(tail).ids
        if tail not in self._tails:
            self._tails[tail] = self._encode(tail).ids
        return self._tails[tail]

    def _encode(self, text: str) -> Encoding:
        return self._backend.encode(text, add_special_tokens=False)

    def _encode_inside(self, piece: str) -> Tokens:
        """Encode a piece from within a text, without the space that some tokenizers put in front of a text."""
        tokens = _tokens(self._encode("\n" + piece))
        skip = len(self._line_break)
        if tokens.ids[:skip] != self._line_break:
            return _tokens(self._encode(piece))
        starts, ends = ([max(0, place - 1) for place in places[skip:]] for places in (tokens.starts, tokens.ends))
        return Tokens(tokens.ids[skip:], starts, ends)


def _tokens(encoding: Encoding) -> Tokens:
    starts, ends = zip(*encoding.offsets, strict=True) if len(encoding) else ((), ())
    return Tokens(encoding.ids, list(starts), list(ends))
