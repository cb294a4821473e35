"""Rows of an update that hold no rollout."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


def test_a_row_without_rollouts_is_one_document():
    """Attention is launched document by document on the CPU: a row of one-token documents would take a step's time."""
    from trainer.rl.placement import Placement

    mesh: Any = SimpleNamespace(dp_size=2, dp_rank=1, pp_size=1, vpp_size=1)
    (batch,) = Placement([3], 8, 1, mesh).build([SimpleNamespace(token_ids=[1, 2, 3, 4], trained=lambda: [0, 1, 1])])  # type: ignore[list-item]
    assert batch.documents is not None and list(batch.documents.bounds) == [0, 8] and not batch.loss_mask.any()
