"""Passkey retrieval (Mohtashami and Jaggi 2023, arXiv:2305.16300, section 4.2): a number hidden in text. No torch.

The hidden sentence lies at a given depth of a text of a given length; the text ends in the question and its answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from configs.errors import BadInput
from trainer.data.indexed import TokenDataset
from trainer.data.tokenizer import Tokenizer

_HIDDEN = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
_QUESTION = "\nWhat is the pass key? The pass key is"
_MOST_DIGITS = 18


@dataclass(frozen=True)
class Passkey:
    """One text with its answer at the end."""

    tokens: NDArray[np.int64]  # [length + 1]: the last has no successor to predict
    num_answer_tokens: int


class PasskeyMaker:
    """Hides keys in the text of a dataset."""

    def __init__(self, tokenizer: Tokenizer, text: TokenDataset, num_digits: int = 5) -> None:
        """Take the surrounding text from `text`, which was made with `tokenizer`. Raises BadInput for no digits."""
        if not 1 <= num_digits <= _MOST_DIGITS:
            raise BadInput(f"--digits: {num_digits} make no passkey; a value that would work: 5")
        self._tokenizer = tokenizer
        self._text = text
        self._keys = (10 ** (num_digits - 1), 10**num_digits)
        self._bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        hidden, asked, _ = self._parts(self._keys[1] - 1)
        self.shortest = len(self._bos) + len(hidden) + len(asked) + 3 * num_digits
        """Tokens in which a key of whatever digits, said three times, has room."""

    def make(self, length: int, depth: float, random: np.random.Generator) -> Passkey:
        """Return a text of `length` + 1 tokens whose key is hidden after the fraction `depth` of the other text."""
        hidden, asked, num_answer = self._parts(int(random.integers(*self._keys)))
        num_filler = length + 1 - len(self._bos) - len(hidden) - len(asked)
        filler = self._read(num_filler, random)
        place = round(depth * num_filler)
        parts = (self._bos, filler[:place], hidden, filler[place:], asked)
        return Passkey(np.concatenate([np.asarray(part, dtype=np.int64) for part in parts]), num_answer)

    def _parts(self, key: int) -> tuple[list[int], list[int], int]:
        """Return the hidden sentence, the question with its answer, and how many tokens the answer has."""
        asked, answered = (self._tokenizer.encode(text) for text in (_QUESTION, f"{_QUESTION} {key}"))
        common = next((place for place, (a, b) in enumerate(zip(asked, answered, strict=False)) if a != b), len(asked))
        return self._tokenizer.encode(_HIDDEN.format(key=key)), answered, len(answered) - common

    def _read(self, num_tokens: int, random: np.random.Generator) -> NDArray[np.int64]:
        """Return consecutive tokens of documents laid end to end, from a random document on, around the end."""
        document, parts = int(random.integers(self._text.num_documents)), []
        while num_tokens > 0:
            length = min(int(self._text.lengths[document]), num_tokens)
            parts.append(self._text.read(document, 0, length).astype(np.int64))
            num_tokens -= length
            document = (document + 1) % self._text.num_documents
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
