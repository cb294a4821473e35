"""The keyed shuffle: a bijection, spread evenly, and the same for ever."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.data.permutation import permute

FROZEN = [3, 10, 5, 8, 11, 0, 7, 6, 4, 2, 9, 1]


@pytest.mark.parametrize("size", [1, 2, 3, 10, 97, 1000, 4096, 100_003])
def test_every_index_is_met_once(size):
    permuted = permute(np.arange(size), size, "key")
    assert np.array_equal(np.sort(permuted), np.arange(size))


def test_keys_give_different_orders():
    orders = {tuple(permute(np.arange(100), 100, f"key {number}")) for number in range(50)}
    assert len(orders) == 50


def test_any_subset_agrees_with_the_whole():
    whole = permute(np.arange(5000), 5000, "key")
    some = np.array([4999, 0, 17, 2500])
    assert np.array_equal(permute(some, 5000, "key"), whole[some])


def test_places_are_spread_evenly():
    size, bins = 100_000, 10
    permuted = permute(np.arange(size), size, "spread")
    counts = np.histogram2d(np.arange(size), permuted, bins=bins)[0]
    expected = size / bins**2
    assert ((counts - expected) ** 2 / expected).sum() < 150  # chi-square of 81 degrees of freedom: mean 81, sd 13


def test_the_order_never_changes():
    """A checkpoint's data cursor means something only while this holds."""
    assert permute(np.arange(12), 12, "frozen").tolist() == FROZEN


def test_an_index_outside_is_refused():
    with pytest.raises(ValueError, match=r"\[0, 5\)"):
        permute(np.array([5]), 5, "key")
