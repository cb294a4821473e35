"""Label smoothing over a vocabulary that tp ranks share (Szegedy et al. 2015, arXiv:1512.00567, section 7).

With a share s of the target spread over the V ids, the loss is (1 - s) * -log p_y + s * mean_j(-log p_j), which is
-log p_y + s * (z_y - mean_j z_j) for logits z: the cross-entropy, and a term that is linear in the logits.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region


def label_over_mean(logits: torch.Tensor, labels: torch.Tensor, output_layer: Any) -> torch.Tensor:
    """Return z_y - mean_j z_j, `[batch, seq]` in fp32, of `logits [seq, batch, vocab/tp]` and `labels [batch, seq]`.

    The mean is over the ids that are real, which `output_layer.num_real_ids` counts. Collective: all ranks of the
    layer's tp group must call this.
    """
    group, num_real = output_layer.tp_group, output_layer.num_real_ids
    excess = _LabelOverMean.apply(logits, labels.t() - group.rank() * logits.shape[-1], group.rank(), num_real)
    return reduce_from_tensor_model_parallel_region(excess, group=group).t()


class _LabelOverMean(torch.autograd.Function):
    """This rank's part of it, `[seq, batch]`. Keeps no logits: the loss, which comes after, may write over them."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, place: torch.Tensor, rank: int, num_real: int) -> torch.Tensor:
        """`place` is that of the label among this rank's ids; it is another rank's where it lies outside."""
        width = logits.shape[-1]
        ctx.width, ctx.dtype, ctx.num_real = width, logits.dtype, num_real
        ctx.num_here = max(min(num_real - rank * width, width), 0)
        is_here = (place >= 0) & (place < width)
        place = torch.where(is_here, place, 0).unsqueeze(-1)
        ctx.save_for_backward(place, is_here)
        of_label = torch.where(is_here, logits.gather(-1, place).squeeze(-1).float(), 0.0)
        return of_label - logits[..., : ctx.num_here].sum(-1, dtype=torch.float32) / num_real

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """1 for the label, -1 / V for every real id."""
        (gradient,) = gradients
        place, is_here = ctx.saved_tensors
        result = torch.zeros(*gradient.shape, ctx.width, dtype=torch.float32, device=gradient.device)
        result[..., : ctx.num_here] = -gradient.unsqueeze(-1) / ctx.num_real
        result.scatter_add_(-1, place, torch.where(is_here, gradient, 0.0).unsqueeze(-1))
        return result.to(ctx.dtype), None, None, None
