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
    group = output_layer.tp_group
    width, first_id, num_real = logits.shape[-1], group.rank() * logits.shape[-1], output_layer.num_real_ids
    place = labels.t() - first_id
    is_here = (place >= 0) & (place < width)
    of_label = logits.gather(-1, torch.where(is_here, place, 0).unsqueeze(-1)).squeeze(-1).float()
    real = logits[..., : max(min(num_real - first_id, width), 0)]
    excess = torch.where(is_here, of_label, 0.0) - real.sum(-1, dtype=torch.float32) / num_real
    return reduce_from_tensor_model_parallel_region(excess, group=group).t()
