"""Losses of reward models: of pairs of answers by their rewards, fp32 `[num_pairs]` each. Pure functions."""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid


def bradley_terry(chosen: torch.Tensor, rejected: torch.Tensor, margin: torch.Tensor) -> torch.Tensor:
    """Return -log sigmoid(chosen - rejected - margin).

    Of the Bradley-Terry model of preferences (arXiv:2203.02155, eq. 1), with a margin (arXiv:2307.09288, eq. 2).
    """
    return -logsigmoid(chosen - rejected - margin)


def centering(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Return the square of the sum of both rewards, which only their differences leave open (arXiv:2312.09244)."""
    return (chosen + rejected) ** 2
