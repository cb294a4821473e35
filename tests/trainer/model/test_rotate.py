"""Rotation of packed documents: what each document alone would give, whatever its neighbours."""

from __future__ import annotations

from typing import Any

import pytest

from tests.pool import Place

LENGTHS = {"uneven": (1, 12, 7, 10), "one": (30,), "an_empty_one": (9, 0, 21)}


def rotate_both_ways(place: Place, lengths: tuple[int, ...], options: dict[str, Any]) -> list[bool]:
    """Return whether output and gradient equal those of each document rotated alone, bit for bit."""
    import torch
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    from trainer.model.rotate import rotate_documents

    torch.manual_seed(3)
    angles = torch.rand(max(lengths), 1, 1, 12)
    tokens = torch.randn(sum(lengths), 4, 16, requires_grad=True)
    alone = tokens.detach().clone().requires_grad_()
    positions = torch.cat([torch.arange(length) for length in lengths])
    found = rotate_documents(tokens, positions, angles, **options)
    parts = [part for part in alone.split(list(lengths)) if len(part)]
    expected = torch.cat(
        [_apply_rotary_pos_emb_bshd(part.unsqueeze(1), angles[: len(part)], **options).squeeze(1) for part in parts]
    )
    weights = torch.randn_like(found)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    return [torch.equal(found, expected), torch.equal(tokens.grad, alone.grad)]


@pytest.mark.parametrize("options", [{}, {"rotary_interleaved": True}, {"mla_rotary_interleaved": True, "mscale": 1.2}])
@pytest.mark.parametrize("name", LENGTHS)
def test_equals_each_document_alone(ranks, name, options):
    assert ranks.run(rotate_both_ways, LENGTHS[name], options) == [[True, True]]


def rotate_in_the_model(place: Place) -> str:
    """Return the name of the function that Megatron-Core rotates packed documents with, once a model was built."""
    from megatron.core.models.common.embeddings import rope_utils

    from tests.small_runs import open_engine, small_config

    with open_engine(place, small_config(1)):
        return rope_utils._apply_rotary_pos_emb_thd.__name__


def test_the_model_uses_it(ranks):
    assert ranks.run(rotate_in_the_model) == ["rotate_documents"]
