"""Pretraining: next-token prediction on packed documents. `launch/pretrain.py` runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from trainer.data.batch import Batch
from trainer.data.reader import BatchReader
from trainer.engine.state import TrainState
from trainer.losses.cross_entropy import compute_cross_entropy
from trainer.losses.loss import Loss
from trainer.stages.forward import forward_language_model


class PretrainStage:
    """Reads the blend in order and minimises the mean next-token loss."""

    name = "pretrain"
    metric_names: tuple[str, ...] = ()

    def __init__(self, reader: BatchReader | None) -> None:
        """Read from `reader`; None serves a run of no steps, which writes a seed checkpoint."""
        self._reader = reader

    def start(self, state: TrainState) -> None:
        """Need nothing: the reader starts at its first batch or where `load_state_dict` put it."""

    def batches_for(self, state: TrainState) -> Sequence[Batch]:
        """Return the next global batch's share of this rank."""
        assert self._reader is not None  # the config check asks for data where there are steps
        return self._reader.read_step()

    def forward(self, model: Any, batch: Batch) -> torch.Tensor:
        """Return per-token losses."""
        return forward_language_model(model, batch)

    def loss(self, output: torch.Tensor, batch: Batch) -> Loss:
        """Return the summed cross-entropy over unmasked tokens."""
        return compute_cross_entropy(output.view_as(batch.loss_mask), batch.loss_mask)

    def state_dict(self) -> Mapping[str, Any]:
        """Return the data cursor."""
        return {"data": self._reader.state_dict() if self._reader is not None else None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the data cursor."""
        if self._reader is not None and state["data"] is not None:
            self._reader.load_state_dict(state["data"])
