"""Datasets in memory, which behave as `TokenDataset` does without importing megatron-core."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

EOD = 0


class MemoryDataset:
    """Documents of counting token ids, so that every token of a dataset is told from every other; each ends in EOD."""

    def __init__(self, prefix: str, lengths: list[int], first_token: int = 1) -> None:
        self.prefix = self.origin = prefix
        self.identity = f"identity of {prefix}"
        self.lengths = np.array(lengths, dtype=np.int32)
        self.num_documents = len(lengths)
        self.num_tokens = int(self.lengths.sum())
        self.meta = SimpleNamespace(eod_id=EOD)
        stream = np.arange(first_token, first_token + self.num_tokens)
        self.documents = np.split(stream, np.cumsum(lengths)[:-1])
        for document in self.documents:
            document[-1:] = EOD

    def read(self, document: int, start: int, length: int) -> np.ndarray:
        assert 0 <= start and start + length <= len(self.documents[document])
        return self.documents[document][start : start + length]

    def read_mask(self, document: int, start: int, length: int) -> None:
        """Say that every token is trained."""

    def read_margin(self, document: int) -> float:
        return document / 4


@pytest.fixture
def make_dataset():
    return MemoryDataset
