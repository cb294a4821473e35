"""Best-fit packing of pieces into rows, by their lengths alone: which piece lies in which row. Knows no tokens.

Ding et al. 2024, "Fewer Truncations Improve Language Modeling" (arXiv:2404.10830): best-fit decreasing. All pieces of
one length are placed at once, so that the work grows with the number of lengths, not of pieces.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Packing:
    """Rows of pieces. Piece number i is the i-th in the order of falling length: 4 bytes a piece, 8 bytes a row."""

    pieces: NDArray[np.int32]  # [num_pieces] piece numbers, row by row
    bounds: NDArray[np.int64]  # [num_rows + 1] where each row begins in `pieces`

    @property
    def num_rows(self) -> int:
        """Rows that the pieces fill."""
        return len(self.bounds) - 1


def pack_best_fit(counts: NDArray[np.int64], row_len: int) -> Packing:
    """Pack `counts[n]` pieces of each length n into rows of `row_len`: the longest first, each into the fullest row
    that has room.

    `counts` int64 [at most row_len + 1]; `counts[0]` is not looked at. Which of several rows with the same room is
    taken, and which piece of a length, makes no difference to the rows' lengths.
    """
    counts = counts[: row_len + 1].copy()
    counts[0] = 0
    row_of = np.empty(int(counts.sum()), dtype=np.int32)
    open_rows = _OpenRows(row_len)
    placed = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        end = placed + int(counts[length])
        while placed < end:
            rows, room = open_rows.take(length, end - placed)
            # The fullest row that has room stays that until it has none: it takes as many pieces as it can.
            each = room // length
            num_pieces = min(len(rows) * each, end - placed)
            row_of[placed : placed + num_pieces] = np.repeat(rows, each)[:num_pieces]
            full, rest = divmod(num_pieces, each)
            open_rows.put(rows[:full], room - each * length)
            open_rows.put(rows[full:], room - rest * length)
            placed += num_pieces
    pieces = np.argsort(row_of, kind="stable").astype(np.int32)
    bounds = np.concatenate(([0], np.cumsum(np.bincount(row_of, minlength=open_rows.num_rows), dtype=np.int64)))
    return Packing(pieces, bounds)


def place_alone(counts: NDArray[np.int64], row_len: int) -> Packing:
    """Give each of `counts[n]` pieces of every length n, int64 [at most row_len + 1], a row of `row_len` of its own."""
    num_pieces = int(counts[1 : row_len + 1].sum())
    return Packing(np.arange(num_pieces, dtype=np.int32), np.arange(num_pieces + 1, dtype=np.int64))


class _OpenRows:
    """Rows by the room they have left."""

    def __init__(self, row_len: int) -> None:
        self.num_rows = 0
        self._row_len = row_len
        self._rooms: list[int] = []  # rising, those of `_rows`
        self._rows: dict[int, list[NDArray[np.int32]]] = {}

    def take(self, length: int, num_pieces: int) -> tuple[NDArray[np.int32], int]:
        """Return the fullest rows with room for `length`, at most as many as the pieces need, and their room.

        New rows where no row has room.
        """
        place = bisect_left(self._rooms, length)
        if place == len(self._rooms):
            needed = -(-num_pieces // (self._row_len // length))
            self.num_rows += needed
            return np.arange(self.num_rows - needed, self.num_rows, dtype=np.int32), self._row_len
        room = self._rooms.pop(place)
        rows = np.concatenate(self._rows.pop(room))
        needed = -(-num_pieces // (room // length))
        self.put(rows[needed:], room)
        return rows[:needed], room

    def put(self, rows: NDArray[np.int32], room: int) -> None:
        """Keep rows that have this room left; full ones are done."""
        if not len(rows) or not room:
            return
        if room not in self._rows:
            self._rows[room] = []
            insort(self._rooms, room)
        self._rows[room].append(rows)
