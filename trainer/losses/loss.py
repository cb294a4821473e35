"""The one return type of every loss. Sums, so that the engine alone divides, once, over the whole global batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Mean:
    """A figure to report that has a divisor of its own."""

    total: torch.Tensor
    """fp32 scalar."""
    count: torch.Tensor
    """Of what the figure is a mean, scalar."""


@dataclass(frozen=True)
class Loss:
    """A microbatch's loss before any averaging; what it is divided by is the objective's `count` of the batch."""

    total: torch.Tensor
    """Sum over what the objective weighs alike (tokens, sequences, pairs), fp32 scalar with gradient."""
    means: Mapping[str, Mean] = field(default_factory=dict)
    """Further figures by name."""
