"""What the engine minimises: the protocol of an objective. Knows nothing of stages, data files or layouts."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from trainer.data.batch import Batch
from trainer.losses.loss import Loss


class Objective(Protocol):
    """Forward pass, loss and divisor of one microbatch."""

    mean_names: tuple[str, ...]
    """Names of the figures that `loss` returns beside the loss itself."""

    def forward(self, model: Any, batch: Batch) -> Any:
        """Run one model chunk on one microbatch on the device; the last pipeline stage returns what `loss` takes."""
        ...

    def loss(self, output: Any, batch: Batch) -> Loss:
        """Return the summed loss of one microbatch from the last pipeline stage's output."""
        ...

    def count(self, batch: Batch) -> torch.Tensor:
        """Return what this microbatch adds to the divisor of the loss (tokens, sequences, pairs), int32 scalar.

        It depends on the batch alone: every pipeline stage knows it, and the router's losses are scaled by it before
        the first backward pass.
        """
        ...
