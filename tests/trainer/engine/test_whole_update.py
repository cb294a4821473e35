"""Clipping, AdamW, weight decay and the schedule together, over several steps, against their formulas in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from configs.stages import Config
from tests.pool import Place
from tests.small_runs import build_stage, open_engine, roughen, small_config, train_steps

PEAK, END, WARM_UP, NUM_STEPS, CLIP, DECAY, BETA1, BETA2, EPS = 3e-3, 3e-4, 2, 6, 2.1, 0.3, 0.9, 0.95, 1e-6


def train_and_record(place: Place, config: Config) -> tuple[list[Any], list[float], dict[str, Any], dict[str, Any]]:
    """Return each step's gradients before clipping, the norms reported, and the weights before and after."""
    from trainer.engine.state import TrainState

    def weights() -> dict[str, Any]:
        return {name: value.detach().double().numpy().copy() for name, value in engine.chunks[0].named_parameters()}

    with open_engine(place, config) as engine:
        roughen(engine)
        before, gradients, plain = weights(), [], engine._update

        def record(sums: Any) -> Any:
            named = engine.chunks[0].named_parameters()
            gradients.append({name: value.main_grad.double().numpy().copy() for name, value in named})
            return plain(sums)

        engine._update = record  # type: ignore[method-assign]
        _, results = train_steps(build_stage(engine, "uneven"), TrainState(), NUM_STEPS)
        return gradients, [result.grad_norm for result in results], before, weights()


def learning_rate(step: int) -> float:
    """Linear to the peak, then half a cosine to the end (Loshchilov & Hutter 2017, arXiv:1608.03983, eq. 5)."""
    if step < WARM_UP:
        return PEAK * (step + 1) / WARM_UP
    return END + (PEAK - END) * (1 + math.cos(math.pi * (step - WARM_UP) / (NUM_STEPS - WARM_UP))) / 2


def follow(start: np.ndarray, gradients: list[np.ndarray], decay: float) -> np.ndarray:
    """Return a weight after AdamW (arXiv:1711.05101, algorithm 2) on its clipped gradients."""
    weight, first, second = start.copy(), np.zeros_like(start), np.zeros_like(start)
    for step, gradient in enumerate(gradients):
        first = BETA1 * first + (1 - BETA1) * gradient
        second = BETA2 * second + (1 - BETA2) * gradient**2
        unbiased = first / (1 - BETA1 ** (step + 1)), second / (1 - BETA2 ** (step + 1))
        weight -= learning_rate(step) * (unbiased[0] / (np.sqrt(unbiased[1]) + EPS) + decay * weight)
    return weight


def test_several_updates_are_the_formulas(ranks):
    """The norm is clipped in some steps and not in others (Pascanu et al. 2013, arXiv:1211.5063, algorithm 1)."""
    optimizer = {
        "lr": PEAK, "min_lr": END, "weight_decay": DECAY, "beta1": BETA1, "beta2": BETA2, "eps": EPS, "clip_grad": CLIP,
    }  # fmt: skip
    config = small_config(
        optimizer=optimizer,
        train={"num_steps": NUM_STEPS, "seq_len": 32, "global_batch_size": 8, "micro_batch_size": 2},
        schedule={"kind": "cosine", "warmup_steps": WARM_UP},
        model={"qkv_bias": True, "tie_embeddings": True},
    )
    ((gradients, norms, before, after),) = ranks.run(train_and_record, config)
    exact = [math.sqrt(sum(float(np.square(one).sum()) for one in step.values())) for step in gradients]
    assert norms == pytest.approx(exact, rel=1e-6)
    factors = [min(1.0, CLIP / norm) for norm in exact]
    assert 1.0 in factors and min(factors) < 0.8, exact
    for name, start in before.items():
        clipped = [step[name] * factor for step, factor in zip(gradients, factors, strict=True)]
        expected = follow(start, clipped, DECAY if start.ndim > 1 else 0.0)
        assert np.abs(expected - start).max() > PEAK  # it moved
        np.testing.assert_allclose(after[name], expected, rtol=0, atol=2e-3 * PEAK, err_msg=name)
