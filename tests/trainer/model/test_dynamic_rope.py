"""Dynamic NTK scaling: a packed document is rotated as it would be alone, whatever its neighbours."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.pool import Place
from tests.small_runs import open_engine, small_config

ROPE = {"scaling": "dynamic", "factor": 4.0, "original_max_position_embeddings": 8}
LENGTHS = (1, 12, 7, 9, 20, 15)  # two rows of 32 tokens, some documents beyond the original length


def losses_of_documents(place: Place, config: Any, lengths: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return the losses of the tokens of packed documents, and with each document in a row of its own."""
    import torch

    from trainer.data.batch import Batch, Documents
    from trainer.engine.forward import forward_language_model

    tokens, labels = torch.randint(0, 250, (2, 2, sum(lengths) // 2), generator=torch.Generator().manual_seed(5))
    positions = torch.cat([torch.arange(length) for length in lengths])
    documents = Documents.build(torch.tensor([0, *lengths]).cumsum(0))
    packed = Batch(tokens, labels, positions.view(2, -1), torch.ones(tokens.shape), documents)
    parts = [column.flatten().split(lengths) for column in (tokens, labels, positions)]
    alone = [
        Batch(row[None], label[None], place_in_row[None], torch.ones(1, len(row)))
        for row, label, place_in_row in zip(*parts, strict=True)
    ]
    with open_engine(place, config) as engine:
        found = engine.score([packed], forward_language_model)
        expected = [engine.score([batch], forward_language_model)[0] for batch in alone]
    return found[0].flatten().numpy(), torch.cat([losses.flatten() for losses in expected]).numpy()


def test_a_packed_document_is_rotated_as_alone(ranks):
    config = small_config(model={"rope": ROPE}, data={"document_mask": True})
    ((found, expected),) = ranks.run(losses_of_documents, config, LENGTHS)
    np.testing.assert_allclose(found, expected, rtol=2e-6)


@pytest.mark.parametrize(
    ("scaling", "is_masked", "has_fused_rotation", "has_own_attention"),
    [
        ("none", False, True, False),
        ("none", True, True, False),
        ("yarn", False, False, False),
        ("yarn", True, False, True),
        ("dynamic", False, False, False),
        ("dynamic", True, False, True),
    ],
)
def test_transformer_engine_rotates_only_what_it_can(
    monkeypatch, scaling, is_masked, has_fused_rotation, has_own_attention
):
    """Its kernel for documents drops yarn's factor on attention without a word, and has one table for all of them."""
    from trainer.model import build
    from trainer.model import config as model_config
    from trainer.model.attention.core import SdpaCoreAttention

    platform = SimpleNamespace(fuses_kernels=True, attention_kernels=lambda compute: "torch")
    mesh: Any = SimpleNamespace(platform=platform, cp_size=1, vpp_size=1)
    monkeypatch.setattr(model_config, "TransformerConfig", SimpleNamespace)
    monkeypatch.setattr(build, "CORE_ATTENTIONS", {"torch": SdpaCoreAttention})
    built = []  # the transformer config and the options of each chunk

    def build_chunk(model, transformer, *rest, **options):
        built.append((transformer, options))
        return SimpleNamespace(post_process=False)

    monkeypatch.setattr(build, "_build_chunk", build_chunk)
    rope = {} if scaling == "none" else ROPE | {"scaling": scaling}
    run = small_config(model={"rope": rope}, data={"document_mask": is_masked})
    build.build_model_chunks(run, mesh, use_te=True)
    ((transformer, options),) = built
    assert transformer.apply_rope_fusion == has_fused_rotation
    assert (options["attention"] is not None) == has_own_attention
