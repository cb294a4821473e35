"""The one return type of every loss. Sums, so that the engine alone divides, once, by the global token count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Loss:
    """A microbatch's loss before any averaging."""

    total: torch.Tensor
    """Sum over the tokens that count, fp32 scalar with gradient."""
    num_tokens: torch.Tensor
    """How many tokens count, int32 scalar."""
    metrics: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Further fp32 scalar sums, reported divided by the global number of tokens."""
