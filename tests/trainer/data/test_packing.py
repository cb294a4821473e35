"""Best-fit packing by lengths: the rows of the plain algorithm, nothing lost, and next to nothing wasted."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.data.packing import Packing, pack_best_fit


def pack(lengths: np.ndarray, row_len: int) -> Packing:
    return pack_best_fit(np.bincount(lengths, minlength=row_len + 1), row_len)


def row_lengths(lengths: np.ndarray, packing: Packing) -> list[list[int]]:
    """The lengths in each row; each piece must lie in one row."""
    assert sorted(packing.pieces.tolist()) == list(range(len(lengths)))
    falling = np.sort(lengths)[::-1]
    return [falling[row].tolist() for row in np.split(packing.pieces, packing.bounds[1:-1])]


def best_fit_decreasing(lengths: np.ndarray, row_len: int) -> list[int]:
    """The algorithm as it is written in any textbook: how full each row is, one piece after the other."""
    filled: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [row for row, used in enumerate(filled) if used + length <= row_len]
        if fitting:
            filled[max(fitting, key=lambda row: filled[row])] += length
        else:
            filled.append(length)
    return sorted(filled)


@pytest.mark.parametrize("row_len, longest", [(16, 16), (100, 60), (100, 9), (1000, 1000), (7, 1)])
def test_rows_are_as_full_as_the_plain_algorithm_leaves_them(row_len, longest):
    for seed in range(8):
        lengths = np.random.default_rng(seed).integers(1, longest + 1, 300)
        rows = row_lengths(lengths, pack(lengths, row_len))
        assert sorted(map(sum, rows)) == best_fit_decreasing(lengths, row_len)


@pytest.mark.parametrize("row_len", [2048, 8192, 131072])
def test_next_to_nothing_of_lengths_as_documents_have_them_is_wasted(row_len):
    lengths = np.random.default_rng(1).lognormal(6.5, 1.3, 200_000).astype(np.int64).clip(1, row_len)
    packing = pack(lengths, row_len)
    fewest = -(-int(lengths.sum()) // row_len)
    assert packing.num_rows <= 1.001 * fewest + 1
    assert max(map(sum, row_lengths(lengths, packing))) <= row_len


def test_lengths_that_leave_holes_need_no_more_rows_than_is_proven():
    """At most 11/9 of the fewest, and 4 (Johnson et al. 1974); here the fewest are known: each row was cut in two."""
    cuts = np.random.default_rng(2).integers(1, 1000, 2000)
    lengths = np.concatenate([cuts, 1000 - cuts])
    assert pack(lengths, 1000).num_rows <= 11 / 9 * 2000 + 4


def test_nothing_to_pack_is_no_row():
    assert pack_best_fit(np.array([5]), 1).num_rows == 0
