"""Sums of parts of a batch are those of the whole."""

from __future__ import annotations

import pytest
import torch

from trainer.engine.sums import BatchSums


def test_parts_add_up_to_the_whole():
    names = ("kl", "accuracy")
    # loss, its divisor, each figure with its divisor, samples, tokens, inputs, pairs
    parts = [torch.tensor(row) for row in ([9.0, 4, 6, 3, 0, 0, 2, 4, 8, 30], [3.0, 2, 1, 1, 5, 10, 1, 2, 8, 10])]
    first, second = (BatchSums.from_vector(part, names) for part in parts)
    whole = BatchSums.from_vector(parts[0] + parts[1], names)
    assert first + second == whole and whole.mean == 2.0
    assert whole.means == {"kl": pytest.approx(7 / 4), "accuracy": 0.5} and first.means["accuracy"] == 0.0
