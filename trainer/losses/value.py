"""The loss of a critic as a pure function of values, token by token: callers sum."""

from __future__ import annotations

import torch


def clipped_value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return max((V - R)^2, (V_c - R)^2) / 2 and where the second is larger; V_c is V within `clip` of the old value.

    All are fp32 `[batch, seq]`. The clipping is that of OpenAI's baselines (`ppo2`), whose half verl and TRL have too;
    None for (V - R)^2 / 2.
    """
    free = (values - returns).square()
    if clip is None:
        return free / 2, torch.zeros_like(values, dtype=torch.bool)
    clipped = (values.clamp(old_values - clip, old_values + clip) - returns).square()
    return torch.maximum(free, clipped) / 2, clipped > free
