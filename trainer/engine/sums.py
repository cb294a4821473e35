"""What is summed over all microbatches and ranks of a step, and divided once. No model, no optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from parallel.mesh import Mesh
from trainer.data.batch import Batch
from trainer.engine.objective import Objective

_NUM_COUNTS = 4


@dataclass(frozen=True)
class BatchSums:
    """One global batch, the same on every rank."""

    total: float
    """Sum of the loss."""
    count: int
    """What it is divided by."""
    num_samples: int
    num_tokens: int
    """Tokens whose loss counts."""
    num_input_tokens: int
    num_attended_pairs: int
    """Over all layers."""
    mean_totals: dict[str, tuple[float, float]]
    """Of the objective's further figures the sums, and what each is divided by."""

    @property
    def means(self) -> dict[str, float]:
        """The objective's further figures; 0 where there was nothing to take a mean of."""
        return {name: total / count if count else 0.0 for name, (total, count) in self.mean_totals.items()}

    def __add__(self, other: BatchSums) -> BatchSums:
        """Return the sums over both, which are of one objective."""
        totals = {
            name: (total + other.mean_totals[name][0], count + other.mean_totals[name][1])
            for name, (total, count) in self.mean_totals.items()
        }
        numbers = ("total", "count", "num_samples", "num_tokens", "num_input_tokens", "num_attended_pairs")
        added = {name: getattr(self, name) + getattr(other, name) for name in numbers}
        return BatchSums(**added, mean_totals=totals)

    @property
    def mean(self) -> float:
        """The loss, 0 where nothing counted."""
        return self.total / self.count if self.count else 0.0

    @classmethod
    def from_vector(cls, summed: torch.Tensor, mean_names: Sequence[str]) -> BatchSums:
        """Read the vector of `add_up` after its reduction; waits for it."""
        total, count, *rest = summed.tolist()
        figures, counts = rest[: 2 * len(mean_names)], [round(value) for value in rest[2 * len(mean_names) :]]
        totals = {name: (figures[2 * place], figures[2 * place + 1]) for place, name in enumerate(mean_names)}
        samples, tokens, inputs, pairs = counts
        return cls(total, round(count), samples, tokens, inputs, pairs, totals)


def add_up(
    rows: Sequence[Sequence[torch.Tensor]],
    batches: Sequence[Batch],
    mean_names: Sequence[str],
    mesh: Mesh,
    windows: Sequence[int | None],
) -> torch.Tensor:
    """Return this rank's sums as one fp64 vector: loss, divisor, each figure and its divisor, then the counts.

    `rows` has one entry a microbatch on the last pipeline stage and is empty elsewhere; `windows` are those of all
    layers.
    """
    num_values = 2 + 2 * len(mean_names)
    local = torch.zeros(num_values + _NUM_COUNTS, dtype=torch.float64, device=mesh.device)
    if rows:
        local[:num_values] = torch.stack([torch.stack([value.double() for value in row]) for row in rows]).sum(0)
        # cp ranks share their samples, so each counts its part of them.
        num_samples = sum(1 for batch in batches for sample in batch.sample_ids if sample >= 0) / mesh.cp_size
        counts = (
            num_samples,
            sum(int((batch.loss_mask > 0).sum()) for batch in batches),
            sum(batch.tokens.numel() for batch in batches),
            sum(batch.num_attended_pairs(windows) for batch in batches),
        )
        local[num_values:] = torch.tensor(counts, dtype=torch.float64)
    return local


def count_ahead(batches: Sequence[Batch], objective: Objective, mesh: Mesh) -> torch.Tensor:
    """Return, before any forward pass, the loss's divisor over the tokens of the global batch: fp32 scalar.

    Collective: all ranks of the `dp_cp` group must call this.
    """
    counted = sum(objective.count(batch).double() for batch in batches)
    tokens = sum(batch.tokens.numel() for batch in batches)
    both = torch.stack([torch.as_tensor(counted), torch.tensor(float(tokens), dtype=torch.float64)]).to(mesh.device)
    dist.all_reduce(both, group=mesh.dp_cp_group)
    return (both[0] / both[1]).float()
