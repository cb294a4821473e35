"""Merging and splitting undo each other, and put each head where Megatron-Core looks for it."""

from __future__ import annotations

import pytest
import torch

from trainer.checkpoint.places import Place, find_place, name_at
from trainer.hf.rules import GateUp, GroupedQkv, PaddedRows


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (8, 2), (4, 1)])
@pytest.mark.parametrize("rest", [(6,), ()])
def test_qkv_lies_by_group(heads, groups, rest):
    size = 3
    query, key, value = (torch.randn(count * size, *rest) for count in (heads, groups, groups))
    qkv = GroupedQkv(heads, groups, size)
    merged = qkv.merge([query, key, value])
    per_group = heads // groups
    for group in range(groups):  # Megatron-Core: [groups, queries of the group + key + value, head_dim]
        row = group * (per_group + 2) * size
        mine = query[group * per_group * size : (group + 1) * per_group * size]
        assert torch.equal(merged[row : row + per_group * size], mine)
        row += per_group * size
        assert torch.equal(merged[row : row + size], key[group * size : (group + 1) * size])
        assert torch.equal(merged[row + size : row + 2 * size], value[group * size : (group + 1) * size])
    for part, again in zip((query, key, value), qkv.split(merged), strict=True):
        assert torch.equal(part, again)


def test_gate_and_up():
    gate, up = torch.randn(5, 3), torch.randn(5, 3)
    merged = GateUp().merge([gate, up])
    assert torch.equal(merged[:5], gate) and torch.equal(GateUp().split(merged)[1], up)


def test_vocabulary_is_padded_with_zeros_and_cut_however_long_it_is():
    table = torch.randn(5, 3)
    padded = PaddedRows(5, 8).merge([table])
    assert padded.shape == (8, 3) and not padded[5:].any()
    assert torch.equal(PaddedRows(5, 8).split(torch.cat([padded, padded]))[0], table)


@pytest.mark.parametrize(
    ("key", "index", "name"),
    [
        ("output_layer.weight", (), "output_layer.weight"),
        ("decoder.layers.mlp.linear_fc2.weight", (3,), "decoder.layers.3.mlp.linear_fc2.weight"),
        ("decoder.layers.3.mlp.linear_fc2.weight", (), "decoder.layers.3.mlp.linear_fc2.weight"),
        (
            "decoder.layers.mlp.experts.experts.linear_fc1.weight",
            (3, 7),
            "decoder.layers.3.mlp.experts.experts.7.linear_fc1.weight",
        ),
        (
            "decoder.layers.3.mlp.experts.experts.linear_fc1.weight",
            (7,),
            "decoder.layers.3.mlp.experts.experts.7.linear_fc1.weight",
        ),
    ],
)
def test_names_and_places(key, index, name):
    assert name_at(key, index) == name
    assert find_place(name, {key}) == Place(key, index)
    assert find_place(name, {"something.else"}) is None
