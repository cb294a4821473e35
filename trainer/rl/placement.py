"""Where rollouts lie in the rows of an update's microbatches, and values per prediction on their way there and back.

The rows are the same on every layout; each data-parallel rank takes its share of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from parallel.mesh import Mesh
from trainer.data.batch import Batch, build_packed_batch
from trainer.data.packing import pack_best_fit


class Placed(Protocol):
    """What lies in a row as one document: a rollout, or another text."""

    @property
    def token_ids(self) -> Sequence[int]:
        """All tokens; the last is no input."""
        ...

    def trained(self) -> NDArray[np.bool_]:
        """Return which predictions count, `[tokens - 1]`."""
        ...


class Placement:
    """Rollouts in rows of `seq_len` predictions, best-fit, and the rows among microbatches and ranks."""

    def __init__(self, lengths: Sequence[int], seq_len: int, micro_batch_size: int, mesh: Mesh) -> None:
        """`lengths` are the predictions of each rollout, its tokens less one; none is longer than a row.

        There is at least one microbatch for each rank, and with virtual stages a multiple of the pipeline's.
        """
        self._seq_len, self._micro_batch_size = seq_len, micro_batch_size
        order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
        packing = pack_best_fit(np.bincount(lengths, minlength=1), seq_len)
        bounds = packing.bounds
        self._rows = [order[packing.pieces[bounds[row] : bounds[row + 1]]].tolist() for row in range(packing.num_rows)]
        self._lengths = list(lengths)
        in_turn = micro_batch_size * mesh.dp_size * (mesh.pp_size if mesh.vpp_size > 1 else 1)
        self.num_rows = max(-(-len(self._rows) // in_turn), 1) * in_turn
        self._dp_size, self._dp_rank = mesh.dp_size, mesh.dp_rank

    @property
    def padding_share(self) -> float:
        """Share of predictions that belong to no rollout."""
        return 1 - sum(self._lengths) / (self.num_rows * self._seq_len)

    def build(self, rollouts: Sequence[Placed]) -> list[Batch]:
        """Return this rank's microbatches: tokens, labels and masks, each rollout a document."""
        rows = np.zeros((self.num_rows, 3, self._seq_len), dtype=np.int64)
        rows[:, 1] = -1
        rows[:, 2] = np.arange(self._seq_len)  # a row without rollouts is one document
        for row, places in enumerate(self._places()):
            end = 0
            for number, start, end in places:
                ids = np.array(rollouts[number].token_ids, dtype=np.int64)
                rows[row, 0, start:end] = ids[:-1]
                rows[row, 1, start:end] = np.where(rollouts[number].trained(), ids[1:], -1)
                rows[row, 2, start:end] = np.arange(end - start)
            rows[row, 2, end:] = np.arange(self._seq_len - end)  # padding is a document of its own
        ids = np.arange(self.num_rows)
        return [
            build_packed_batch(own, tuple(mine.tolist()))
            for own, mine in zip(self._mine(rows), self._mine(ids), strict=True)
        ]

    def column(self, values: Sequence[NDArray[np.floating]]) -> list[torch.Tensor]:
        """Lay values of each rollout's predictions where these lie: fp32 `[micro_batch, seq]` a microbatch, else 0."""
        rows = np.zeros((self.num_rows, self._seq_len), dtype=np.float32)
        for row, places in enumerate(self._places()):
            for number, start, end in places:
                rows[row, start:end] = values[number]
        return [torch.from_numpy(own) for own in self._mine(rows)]

    def take_back(self, columns: Sequence[Sequence[NDArray[np.floating]]]) -> list[NDArray[np.floating]]:
        """Return the values of each rollout's predictions, given the columns of every data-parallel rank."""
        whole = np.stack([np.stack(list(own)) for own in columns], axis=1)  # [microbatch, dp, micro_batch, seq]
        rows = whole.reshape(self.num_rows, self._seq_len)
        found: list[NDArray[np.floating]] = [np.empty(0)] * len(self._lengths)
        for row, places in enumerate(self._places()):
            for number, start, end in places:
                found[number] = rows[row, start:end]
        return found

    def _places(self) -> list[list[tuple[int, int, int]]]:
        """Return for each row that is not all padding its rollouts, with where each begins and ends."""
        placed = []
        for row in self._rows:
            ends = np.cumsum([self._lengths[number] for number in row]).tolist()
            placed.append([(number, end - self._lengths[number], end) for number, end in zip(row, ends, strict=True)])
        return placed

    def _mine(self, rows: np.ndarray) -> np.ndarray:
        """Return this rank's part of something that each row has, `[microbatch, micro_batch, ...]`."""
        dealt = rows.reshape(-1, self._dp_size, self._micro_batch_size, *rows.shape[1:])
        return np.ascontiguousarray(dealt[:, self._dp_rank])
