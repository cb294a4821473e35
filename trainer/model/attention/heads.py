"""Queries, keys and values as kernels want them: of one size, with as many heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def repeat_heads(part: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Return keys or values, whose dimension 1 is the heads, with as many heads as the queries have."""
    repeats = num_heads // part.shape[1]
    return part if repeats == 1 else part.repeat_interleave(repeats, dim=1)


def widen(*parts: torch.Tensor, multiple: int = 1) -> list[torch.Tensor]:
    """Return tensors of one last size, which kernels want, with zero columns behind, which change nothing (MLA)."""
    widest = max(part.shape[-1] for part in parts)
    width = -(-widest // multiple) * multiple
    return [part if part.shape[-1] == width else F.pad(part, (0, width - part.shape[-1])) for part in parts]
