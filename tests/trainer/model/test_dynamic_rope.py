"""Dynamic NTK scaling: every row and every packed document is rotated as it would be alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.pool import Place
from tests.small_runs import open_engine, small_config

ROPE = {"scaling": "dynamic", "factor": 4.0, "original_max_position_embeddings": 8}
LENGTHS = (1, 12, 7, 9, 20, 15)  # two rows of 32 tokens


def losses_of_documents(place: Place, config: Any, lengths: tuple[int, ...]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the losses of tokens in packed documents, and those of each document in a row of its own."""
    import torch

    from trainer.data.batch import Batch, Documents, share_of
    from trainer.stages.forward import forward_language_model

    tokens, labels = torch.randint(0, 250, (2, 2, sum(lengths) // 2), generator=torch.Generator().manual_seed(5))
    positions = torch.cat([torch.arange(length) for length in lengths]).view(2, -1)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    whole = Batch(tokens, labels, positions, torch.ones(tokens.shape), Documents.build(bounds))
    with open_engine(place, config) as engine:
        packed = share_of(whole, engine.mesh.cp_rank, engine.mesh.cp_size)
        (found,) = engine.score([whole], forward_language_model) if engine.mesh.cp_size > 1 else (None,)
        if found is None:
            (found,) = engine.score([packed], forward_language_model)
        alone = []
        if engine.mesh.cp_size == 1:
            rows = zip(tokens.flatten().split(lengths), labels.flatten().split(lengths), strict=True)
            for row, label in rows:
                place_in_row = torch.arange(len(row)).unsqueeze(0)
                batch = Batch(row.unsqueeze(0), label.unsqueeze(0), place_in_row, torch.ones(1, len(row)))
                (losses,) = engine.score([batch], forward_language_model)
                alone.append(losses.flatten().numpy())
        return found.flatten().numpy(), alone


def test_a_packed_document_is_rotated_as_alone(ranks):
    config = small_config(model={"rope": ROPE}, data={"document_mask": True})
    ((found, alone),) = ranks.run(losses_of_documents, config, LENGTHS)
    np.testing.assert_allclose(found, np.concatenate(alone), rtol=2e-6)
