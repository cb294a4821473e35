"""What delayed scaling remembers: the largest values that each linear's operands had in earlier steps.

One table for all linears of a pipeline stage, experts of other ranks included, so that one reduction a step makes it
the same on all ranks of the stage, whatever their layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

OPERANDS = ("input", "weight", "gradient")


@dataclass(frozen=True)
class Site:
    """A linear layer by its place in the whole model."""

    layer: int
    """From 0, over all pipeline stages."""
    name: str
    """Inside the layer; the same for all experts of a layer."""
    expert: int | None = None
    """From 0, over all ranks."""


class AmaxHistory:
    """The largest values of `sites` x operands x steps, newest step first; 0 where nothing was seen."""

    def __init__(
        self, sites: Sequence[Site], length: int, compute: Literal["max", "most_recent"], device: torch.device
    ) -> None:
        self.sites = {site: row for row, site in enumerate(sites)}
        self.values = torch.zeros(len(sites), len(OPERANDS), length, device=device)
        self._compute = compute
        self._present = torch.zeros(len(sites), len(OPERANDS), device=device)
        self._used = torch.zeros_like(self._present)
        self.is_empty = True

    def record(self, site: Site, operand: str, amax: torch.Tensor) -> None:
        """Take note of a value of this step."""
        cell = self._present[self.sites[site], OPERANDS.index(operand)]
        torch.maximum(cell, amax.view(()), out=cell)

    def amax(self, site: Site, operand: str) -> torch.Tensor:
        """Return the value to scale by, a scalar; 0 if none was ever seen."""
        return self._used[self.sites[site], OPERANDS.index(operand)]

    def close_step(self, group: torch.distributed.ProcessGroup, *, is_applied: bool) -> None:
        """Move this step's values into the history, or forget them if the step was skipped.

        Collective: all ranks of the pipeline stage must call this, with the same `is_applied`.
        """
        if is_applied:
            torch.distributed.all_reduce(self._present, op=torch.distributed.ReduceOp.MAX, group=group)
            self.values = torch.cat((self._present.unsqueeze(-1), self.values[..., :-1]), dim=-1)
            self._choose()
            self.is_empty = False
        self._present.zero_()

    def load(self) -> None:
        """Take over what was put into `values`."""
        self._choose()
        self.is_empty = not bool(self._used.any())

    def _choose(self) -> None:
        """Compute what to scale by."""
        self._used = self.values.amax(dim=-1) if self._compute == "max" else self.values[..., 0].clone()
