"""One source of samples: documents shuffled anew each epoch, laid end to end, cut into windows of seq_len + 1.

Sample k of a source depends on (seed, data, seq_len, k) alone. Knows nothing of ranks, batches or other sources.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from configs.errors import BadInput
from trainer.data.indexed import TokenDataset
from trainer.data.permutation import permute


class Source(Protocol):
    """What a blend draws from."""

    packing: str
    """As `data.packing` names it."""
    dataset: TokenDataset
    seq_len: int
    num_samples: int
    """Samples of one epoch."""

    def read(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Read the samples with these numbers (any >= 0): int64 [len(samples), ...]."""
        ...


@dataclass(frozen=True)
class _Epoch:
    """The documents of one epoch in their order and where each ends in the row of all tokens: 12 bytes a document."""

    key: str
    documents: NDArray[np.integer]  # [num_documents]
    ends: NDArray[np.int64]  # [num_documents] tokens up to and including each document


class TokenSource:
    """An endless row of samples over a dataset; an epoch gives every token once, but for a short tail."""

    packing = "concat"

    def __init__(self, dataset: TokenDataset, seq_len: int, seed: int, field: str = "data.train") -> None:
        """Lay windows of `seq_len` + 1 tokens over `dataset`.

        Raises BadInput, which names `field`, when not even one fits.
        """
        self.dataset = dataset
        self.seq_len = seq_len
        self.seed = seed
        self.num_samples = (dataset.num_tokens - 1) // seq_len  # in one epoch
        self._epochs: dict[int, _Epoch] = {}
        if self.num_samples < 1:
            raise BadInput(
                f"{field}: {dataset.prefix} has {dataset.num_tokens} tokens, fewer than a sample's train.seq_len + 1 = "
                f"{seq_len + 1}; a value of train.seq_len that would work: {max(dataset.num_tokens - 1, 1)} or less"
            )

    def read(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Read the samples with these numbers (any >= 0): tokens int64 [len(samples), seq_len + 1]."""
        tokens = np.empty((len(samples), self.seq_len + 1), dtype=np.int64)
        epochs = samples // self.num_samples
        for number in np.unique(epochs):
            epoch = self._epoch(int(number))
            rows = np.flatnonzero(epochs == number)
            windows = permute(samples[rows] % self.num_samples, self.num_samples, epoch.key + "/windows")
            starts = windows * self.seq_len
            firsts = np.searchsorted(epoch.ends, starts, side="right")
            for row, start, first in zip(rows, starts, firsts, strict=True):
                self._fill(tokens[row], epoch, int(start), int(first))
        return tokens

    def _fill(self, row: NDArray[np.int64], epoch: _Epoch, start: int, place: int) -> None:
        """Fill `row` with the tokens from `start` of the epoch's row of tokens on; `place` is the document there."""
        filled = 0
        while filled < row.size:
            left = int(epoch.ends[place]) - start
            count = min(left, row.size - filled)
            if count:
                document = int(epoch.documents[place])
                offset = int(self.dataset.lengths[document]) - left
                row[filled : filled + count] = self.dataset.read(document, offset, count)
            filled += count
            start += count
            place += 1

    def _epoch(self, number: int) -> _Epoch:
        """Build the order of an epoch's documents, or take it from the last two, since a step may span two epochs."""
        if number not in self._epochs:
            key = f"{self.seed}/{self.dataset.identity}/{number}"
            num_documents = self.dataset.num_documents
            documents = permute(np.arange(num_documents, dtype=np.int64), num_documents, key + "/documents")
            ends = np.cumsum(self.dataset.lengths[documents], dtype=np.int64)
            small = np.int32 if num_documents < 2**31 else np.int64
            while len(self._epochs) > 1:
                del self._epochs[min(self._epochs)]
            self._epochs[number] = _Epoch(key, documents.astype(small), ends)
        return self._epochs[number]
