"""What objectives of compared answers have alike: sums by answer over the ranks that share a row, and their loss."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist

from trainer.data.batch import Batch
from trainer.data.sequences import sum_by_sequence
from trainer.losses.loss import Loss, Mean


def sum_answers(values: torch.Tensor, batch: Batch, cp_group: dist.ProcessGroup) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sums `[num_sequences]` of trained tokens' values `[batch, seq/cp]`, and 1 for comparisons that count.

    Every cp rank has the sums over all of them, with the gradient of its own tokens; a comparison counts where the last
    trained token of its first answer lies. Collective: all cp ranks must call this.
    """
    sequence, num_sequences = batch.columns["sequence"], len(batch.sequences["side"])
    own = sum_by_sequence(torch.where(batch.loss_mask > 0, values.float(), 0.0), sequence, num_sequences)
    whole = own.detach().clone()
    dist.all_reduce(whole, group=cp_group)
    is_here = sum_by_sequence(batch.columns["ends"].float(), sequence, num_sequences)[::2]
    return whole + (own - own.detach()), is_here


def sum_comparisons(
    losses: torch.Tensor, figures: Mapping[str, tuple[torch.Tensor, torch.Tensor]], is_here: torch.Tensor
) -> Loss:
    """Return the summed loss of comparisons whose losses all cp ranks have, each with the gradient of its own tokens.

    `figures` are values of comparisons and their weights.
    """
    total = (is_here * losses.detach() + (losses - losses.detach())).sum()
    means = {
        name: Mean((is_here * value).sum().detach(), (is_here * weight).sum())
        for name, (value, weight) in figures.items()
    }
    return Loss(total, means)
