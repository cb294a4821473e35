"""What a reference says of answers, in checkpoints of today and of before."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from configs.errors import BadInput
from trainer.engine.parts import SavedState
from trainer.rl.reference_scores import ReferenceScores

MESH: Any = SimpleNamespace(rank=0)
KEYS, LOG_PROBS = torch.tensor([3, 5]), torch.tensor([-1.5, -2.5])


@pytest.mark.parametrize("name", ["reference_scores", "reference"])  # the second until online DPO came
def test_scores_are_loaded_by_the_names_that_a_checkpoint_has(name: str) -> None:
    saved = SavedState({f"{name}.keys": (2,), f"{name}.log_probs": (2,)}, is_same_layout=True)
    scores = ReferenceScores(MESH)
    asked = scores.sharded_state(saved)
    assert {key: tuple(shard.data.shape) for key, shard in asked.items()} == saved.shapes
    scores.load({f"{name}.keys": KEYS, f"{name}.log_probs": LOG_PROBS})
    kept = scores.sharded_state(None)
    assert list(kept) == ["reference_scores.keys", "reference_scores.log_probs"]
    assert [shard.data.tolist() for shard in kept.values()] == [[3, 5], [-1.5, -2.5]]


def test_a_checkpoint_without_scores_is_refused() -> None:
    with pytest.raises(BadInput, match="preference.loss: the checkpoint that is resumed has no reference"):
        ReferenceScores(MESH).sharded_state(SavedState({"reference.embedding.weight": (4, 4)}, is_same_layout=True))
