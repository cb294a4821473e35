"""One source of samples: rows of whole documents, packed best-fit, in an order shuffled anew each epoch.

Sample k of a source depends on (seed, data, seq_len, k) alone. Knows nothing of ranks, batches or other sources.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from configs.errors import BadInput
from trainer.data.indexed import TokenDataset
from trainer.data.packing import Packing, pack_best_fit, place_alone
from trainer.data.permutation import permute
from trainer.data.source import TokenSource

TOKENS, LABELS, POSITIONS, SIDES, MARGINS = range(5)
"""What the planes of a packed row are; a label of -1 counts for nothing. Sides are those of comparisons alone, and
margins, the bits of fp32 numbers, those of scored ones."""
CHOSEN, REJECTED, MISMATCHED = 1, 2, 3
"""Sides of answers, of single ones good and bad; a mismatched answer is another prompt's. 0 is what is no answer's."""


@dataclass(frozen=True)
class _Epoch:
    """The documents that the packed rows of one epoch hold, row by row: 4 bytes a document."""

    key: str
    documents: NDArray[np.integer]  # [num_pieces]


class PackedSource:
    """An endless row of samples over a dataset; an epoch predicts every token once from what its document has before.

    A document of n tokens has n - 1 predictions and takes that many places of a row. One with more than a row has is
    split: rows of its own as long as they are full, and the rest is packed as a document is. How many documents of
    which length lie in a row is planned once; which documents these are, and the order of rows, is shuffled each epoch.
    """

    packing = "best_fit"
    _num_planes = 3
    _documents_each = 1  # that lie in a row together, as one
    _pack: Callable[[NDArray[np.int64], int], Packing] = staticmethod(pack_best_fit)

    def __init__(self, dataset: TokenDataset, seq_len: int, seed: int, field: str = "data.train") -> None:
        """Pack `dataset` into rows of `seq_len`.

        Raises BadInput, which names `field`, when no document has two tokens.
        """
        self.dataset = dataset
        self.seq_len = seq_len
        self.seed = seed
        num_predictions = self._num_predictions()
        rests = num_predictions % seq_len
        self._plan = self._pack(np.bincount(rests, minlength=seq_len), seq_len)
        self._split = np.flatnonzero(num_predictions >= seq_len)  # documents that fill rows of their own
        self._split_ends = np.cumsum(num_predictions[self._split] // seq_len, dtype=np.int64)
        num_full_rows = int(self._split_ends[-1]) if self._split.size else 0
        self.num_samples = self._plan.num_rows + num_full_rows  # in one epoch
        self.num_split = int(np.count_nonzero(num_predictions > seq_len))
        self.num_predictions = int(num_predictions.sum(dtype=np.int64))
        self._epochs: dict[int, _Epoch] = {}
        if self.num_samples < 1:
            has_window = dataset.num_tokens > seq_len
            works = "a value that would work: data.packing=concat" if has_window else "give data of longer documents"
            raise BadInput(
                f"{field}: no document of {dataset.prefix} has two tokens, so that data.packing=best_fit finds nothing "
                f"to predict; {works}"
            )

    @property
    def padding_share(self) -> float:
        """The share of an epoch's places that hold no prediction."""
        return 1 - self.num_predictions / (self.num_samples * self.seq_len)

    def read(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Read the samples with these numbers (any >= 0): int64 [len(samples), 3, seq_len].

        The planes are TOKENS, LABELS and POSITIONS; positions begin at 0 in every document, and in the padding behind
        the last one, whose tokens are 0 and whose labels are -1.
        """
        rows = np.empty((len(samples), self._num_planes, self.seq_len), dtype=np.int64)
        epochs = samples // self.num_samples
        for number in np.unique(epochs):
            epoch = self._epoch(int(number))
            mine = np.flatnonzero(epochs == number)
            places = permute(samples[mine] % self.num_samples, self.num_samples, epoch.key + "/rows")
            for row, place in zip(mine.tolist(), places.tolist(), strict=True):
                if place < self._plan.num_rows:
                    self._fill_packed(rows[row], epoch, place)
                else:
                    self._fill_full(rows[row], place - self._plan.num_rows)
        return rows

    def _fill_packed(self, row: NDArray[np.int64], epoch: _Epoch, place: int) -> None:
        """Fill `row` with the documents of a packed row, and padding."""
        filled = 0
        for document in epoch.documents[self._plan.bounds[place] : self._plan.bounds[place + 1]].tolist():
            num_predictions = self._count(document)
            count = num_predictions % self.seq_len
            self._fill(row[:, filled : filled + count], document, num_predictions - count)
            filled += count
        row[TOKENS, filled:] = 0
        row[LABELS, filled:] = -1
        row[POSITIONS, filled:] = np.arange(self.seq_len - filled)
        row[SIDES:, filled:] = 0

    def _fill_full(self, row: NDArray[np.int64], number: int) -> None:
        """Fill `row` with the full row of this number of all documents that are split."""
        place = int(np.searchsorted(self._split_ends, number, side="right"))
        before = int(self._split_ends[place - 1]) if place else 0
        self._fill(row, int(self._split[place]), (number - before) * self.seq_len)

    def _fill(self, piece: NDArray[np.int64], document: int, start: int) -> None:
        """Fill a part of a row with tokens of `document` from `start` on, and the token behind each as its label."""
        count = piece.shape[1]
        tokens = self.dataset.read(document, start, count + 1)
        piece[TOKENS], piece[LABELS] = tokens[:-1], tokens[1:]
        trained = self.dataset.read_mask(document, start + 1, count)
        if trained is not None:
            piece[LABELS][trained == 0] = -1
        piece[POSITIONS] = np.arange(count)

    def _epoch(self, number: int) -> _Epoch:
        """Deal an epoch's documents to the rows, or take it from the last two, since a step may span two epochs."""
        if number not in self._epochs:
            key = f"{self.seed}/{self.dataset.identity}/{number}"
            num_documents = self.dataset.num_documents // self._documents_each
            documents = permute(np.arange(num_documents, dtype=np.int64), num_documents, key + "/documents")
            documents = documents.astype(np.int32 if num_documents < 2**31 else np.int64)
            rests = self._num_predictions()[documents] % self.seq_len
            documents, rests = documents[rests > 0], rests[rests > 0]
            # Of 16 bits numpy sorts by radix, several times as fast.
            falling = (self.seq_len - rests).astype(np.uint16 if self.seq_len < 2**16 else np.int32)
            documents = documents[np.argsort(falling, kind="stable")]
            while len(self._epochs) > 1:
                del self._epochs[min(self._epochs)]
            self._epochs[number] = _Epoch(key, documents[self._plan.pieces])
        return self._epochs[number]

    def _num_predictions(self) -> NDArray[np.int32]:
        """Return the predictions of each document, or of those that lie together."""
        return np.maximum(self.dataset.lengths, 1) - np.int32(1)

    def _count(self, document: int) -> int:
        return int(self.dataset.lengths[document]) - 1


class PaddedSource(PackedSource):
    """The same with every document in a row of its own, the rest of which is padding."""

    packing = "padded"
    _pack = staticmethod(place_alone)


class PairedSource(PackedSource):
    """The same with documents 2i and 2i + 1 side by side in one row, which holds both whole; rows have a plane SIDES.

    Sides are what the dataset's mask holds; without one, all of a pair is trained, and its first document chosen.
    """

    packing = "pairs"
    _num_planes = 4
    _documents_each = 2

    def _fill(self, piece: NDArray[np.int64], document: int, start: int) -> None:
        """Fill a part of a row with both documents of the pair of this number."""
        filled = 0
        for each in (2 * document, 2 * document + 1):
            count = int(self.dataset.lengths[each]) - 1
            own = piece[:, filled : filled + count]
            super()._fill(own, each, 0)
            sides = self.dataset.read_mask(each, 1, count)
            own[SIDES] = (CHOSEN, REJECTED)[each % 2] if sides is None else sides
            filled += count

    def _num_predictions(self) -> NDArray[np.int32]:
        return super()._num_predictions().reshape(-1, 2).sum(axis=1, dtype=np.int32)

    def _count(self, document: int) -> int:
        return int(self.dataset.lengths[2 * document : 2 * document + 2].sum()) - 2


class ScoredPairSource(PairedSource):
    """The same with every token of a pair read, and one label an answer: its last trained token, where it is read.

    The value there is the answer's score, as `transformers` takes that of the last token of a sequence. Sides stand
    there alone; a fifth plane has the pair's margin.
    """

    packing = "scored_pairs"
    _num_planes = 5

    def _fill(self, piece: NDArray[np.int64], document: int, start: int) -> None:
        """Fill a part of a row with both documents of the pair of this number."""
        filled = 0
        for each in (2 * document, 2 * document + 1):
            count = int(self.dataset.lengths[each])
            own = piece[:, filled : filled + count]
            own[TOKENS], own[LABELS], own[SIDES] = self.dataset.read(each, 0, count), -1, 0
            own[POSITIONS] = np.arange(count)
            own[MARGINS] = np.float32(self.dataset.read_margin(each)).view(np.int32)
            sides = self.dataset.read_mask(each, 0, count)
            last = count - 1 if sides is None else int(np.flatnonzero(sides)[-1])
            own[LABELS, last] = own[TOKENS, last]
            own[SIDES, last] = (CHOSEN, REJECTED)[each % 2]
            filled += count

    def _num_predictions(self) -> NDArray[np.int32]:
        return self.dataset.lengths.reshape(-1, 2).sum(axis=1, dtype=np.int32)

    def _count(self, document: int) -> int:
        return int(self.dataset.lengths[2 * document : 2 * document + 2].sum())


SOURCES: dict[str, type[TokenSource] | type[PackedSource]] = {
    source.packing: source for source in (TokenSource, PackedSource, PaddedSource, PairedSource, ScoredPairSource)
}
"""By `data.packing`, and what serves fine-tuning and preferences alone."""
