"""The `optimizer` and `schedule` sections. Torch-free plain data."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Annotated, Literal

from pydantic import Field

from configs.sections.base import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section


class OptimizerConfig(Section):
    """AdamW (arXiv:1711.05101); weight decay is not applied to biases and norm weights."""

    lr: PositiveFloat = 3e-4
    """Peak learning rate."""
    min_lr: NonNegativeFloat = 3e-5
    """Learning rate at the end of the decay."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay."""
    beta1: Fraction = 0.9
    """Decay of the first moment."""
    beta2: Fraction = 0.95
    """Decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the denominator."""
    clip_grad: NonNegativeFloat = 1.0
    """Largest global L2 norm of the gradient; 0 for no clipping."""


class ScheduleConfig(Section):
    """Learning rate over steps: linear warm-up, then the decay; weight decay stays constant."""

    kind: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Shape after warm-up; wsd is warm-up, stable, decay (arXiv:2404.06395)."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up from 0 to `optimizer.lr`."""
    warmup_fraction: Annotated[float, Field(ge=0, lt=1, examples=[0.03])] | None = None
    """Warm-up as a share of the run's steps, rounded up but never all of them, instead of warmup_steps; null for these.
    """
    decay_steps: PositiveInt | None = None
    """Step at which `optimizer.min_lr` is reached; default `train.num_steps`."""
    wsd_decay_steps: PositiveInt | None = None
    """wsd only: steps of the final decay; default a tenth of `decay_steps`."""
    wsd_decay: Literal["linear", "cosine", "exponential"] = "linear"
    """wsd only: shape of the final decay."""

    def count_warmup_steps(self, num_steps: int) -> int:
        """Return the steps of warm-up in a run of `num_steps`."""
        if self.warmup_fraction is None:
            return self.warmup_steps
        share = Decimal(str(self.warmup_fraction))  # 0.07 * 100 is above 7 in floating point
        return min(math.ceil(share * num_steps), max(num_steps - 1, 0))
