"""The protocol of a training stage: four methods, nothing of layouts, optimizers or files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from trainer.data.batch import Batch
from trainer.engine.state import TrainState
from trainer.losses.loss import Loss


class Stage(Protocol):
    """What one stage of training says about itself."""

    name: str
    metric_names: tuple[str, ...]
    """Names of the sums that `loss` returns beside the loss itself."""

    def start(self, state: TrainState) -> None:
        """Prepare for the first step after a fresh start, a warm start or a resume."""
        ...

    def batches_for(self, state: TrainState) -> Sequence[Batch]:
        """Return this rank's microbatches of the step that follows `state`."""
        ...

    def forward(self, model: Any, batch: Batch) -> torch.Tensor:
        """Run one model chunk on one microbatch on the device; the last pipeline stage returns what `loss` takes."""
        ...

    def loss(self, output: torch.Tensor, batch: Batch) -> Loss:
        """Return the summed loss of one microbatch from the last pipeline stage's output."""
        ...

    def state_dict(self) -> Mapping[str, Any]:
        """Return what a checkpoint must keep of the stage, as plain data that is the same on every rank."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned, on any layout."""
        ...
