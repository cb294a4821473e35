"""The critic's loss against its closed form, value and gradient, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trainer.losses.value import clipped_value_loss


@pytest.mark.parametrize("clip", [0.2, None])
def test_values_and_gradients_are_those_of_the_larger_square(clip):
    random = np.random.default_rng(2)
    new, old, returns = random.normal(size=(3, 40))
    values = torch.tensor(new, requires_grad=True)
    loss, is_clipped = clipped_value_loss(values, torch.tensor(old), torch.tensor(returns), clip)
    loss.sum().backward()
    for place in range(40):
        error = new[place] - returns[place]
        expected, slope, beyond = error**2 / 2, error, False
        if clip is not None:
            held = min(max(new[place], old[place] - clip), old[place] + clip)
            beyond = (held - returns[place]) ** 2 > error**2
            if beyond:
                expected, slope = (held - returns[place]) ** 2 / 2, 0.0
        assert float(loss[place]) == pytest.approx(expected, rel=1e-12)
        assert float(values.grad[place]) == pytest.approx(slope, rel=1e-12) and bool(is_clipped[place]) == beyond
    assert bool(is_clipped.any()) == (clip is not None) and not bool(is_clipped.all())
