"""Learning rate as a pure function of the step, so that resuming needs no state."""

from __future__ import annotations

import math

from configs.sections.optimizer import OptimizerConfig, ScheduleConfig


def compute_learning_rate(step: int, num_steps: int, optimizer: OptimizerConfig, schedule: ScheduleConfig) -> float:
    """Return the learning rate of update number `step` (the first is 0) of a run of `num_steps` updates.

    Warm-up is linear and reaches `optimizer.lr` with its last update, so that no update is spent on zero.
    """
    warmup_steps = schedule.count_warmup_steps(num_steps)
    if step < warmup_steps:
        return optimizer.lr * (step + 1) / warmup_steps
    decay_end = schedule.decay_steps or num_steps
    if schedule.kind == "constant":
        return optimizer.lr
    if schedule.kind == "wsd":
        decay_length = schedule.wsd_decay_steps or max(1, decay_end // 10)
        progress = (step - (decay_end - decay_length)) / decay_length
        shape = schedule.wsd_decay
    else:
        progress = (step - warmup_steps) / max(1, decay_end - warmup_steps)
        shape = schedule.kind
    return _decay(min(max(progress, 0.0), 1.0), shape, optimizer.lr, optimizer.min_lr)


def _decay(progress: float, shape: str, high: float, low: float) -> float:
    """Go from `high` at progress 0 to `low` at progress 1."""
    if shape == "linear":
        return high + (low - high) * progress
    if shape == "cosine":
        return low + (high - low) * 0.5 * (1.0 + math.cos(math.pi * progress))
    # Exponential in the shape of WSD (arXiv:2404.06395): halved equal numbers of times a step, rescaled to end at low.
    return low + (high - low) * (2.0 * 0.5**progress - 1.0)
