"""The mask decides what counts: values, gradients and counts, also where a masked loss is not finite."""

from __future__ import annotations

import math

import pytest
import torch

from trainer.losses.cross_entropy import compute_cross_entropy, count_tokens


def test_sums_what_counts():
    losses = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    mask = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    loss = compute_cross_entropy(losses, mask)
    assert loss.total.item() == 37.0
    assert count_tokens(mask).item() == 3 and count_tokens(mask).dtype == torch.int32
    assert loss.means == {}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_masked_positions_count_for_nothing_even_if_not_finite(value):
    losses = torch.tensor([[1.0, value, 2.0]], requires_grad=True)
    loss = compute_cross_entropy(losses, torch.tensor([[1.0, 0.0, 1.0]]))
    assert loss.total.item() == 3.0
    loss.total.backward()
    assert losses.grad.tolist() == [[1.0, 0.0, 1.0]]


def test_counted_positions_that_are_not_finite_show():
    losses = torch.tensor([[1.0, math.nan]])
    assert compute_cross_entropy(losses, torch.ones(1, 2)).total.isnan()


def test_nothing_counted_is_zero_with_a_gradient():
    losses = torch.tensor([[1.0, 2.0]], requires_grad=True)
    loss = compute_cross_entropy(losses, torch.zeros(1, 2))
    assert loss.total.item() == 0.0 and count_tokens(torch.zeros(1, 2)).item() == 0
    loss.total.backward()
    assert losses.grad.tolist() == [[0.0, 0.0]]


def test_sums_in_fp32():
    losses = torch.full((1, 4096), 1.001, dtype=torch.bfloat16)
    loss = compute_cross_entropy(losses, torch.ones(1, 4096))
    assert loss.total.dtype == torch.float32 and loss.total.item() == 4096 * losses[0, 0].float().item()
