"""Datasets with a mask: labels that do not count, rows of their own, and what weighs samples alike."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.errors import BadInput
from trainer.data.batch import build_packed_batch, share_of, with_document_lengths, with_sample_weights, without_loss
from trainer.data.dataset_files import MASK_SUFFIX, DatasetMeta
from trainer.data.indexed import TokenDataset
from trainer.data.making.parts import write_dataset
from trainer.data.packed_source import LABELS, POSITIONS, SOURCES, TOKENS

LENGTHS = (5, 3, 9, 2)


@pytest.fixture
def chats(tmp_path) -> TokenDataset:
    """Return samples in which token ids count up from 1 and even ids are trained."""
    lengths = np.array(LENGTHS, dtype=np.int32)
    tokens = np.arange(1, lengths.sum() + 1, dtype=np.uint16)
    prefix = tmp_path / "chats"
    write_dataset(prefix, tokens, lengths)
    mask = (tokens % 2 == 0).astype(np.uint8)
    Path(f"{prefix}{MASK_SUFFIX}").write_bytes(mask.tobytes())
    DatasetMeta(
        "hash", 50, 0, "uint16", len(lengths), int(lengths.sum()), 0, "", "bin", "idx", mask_sha256="mask"
    ).write(Path(f"{prefix}.meta.json"))
    return TokenDataset(str(prefix))


@pytest.mark.parametrize("packing", ["best_fit", "padded"])
def test_only_trained_tokens_are_labels(chats, packing):
    source = SOURCES[packing](chats, 8, seed=1)
    assert source.num_samples == (2 if packing == "best_fit" else len(LENGTHS))
    rows = source.read(np.arange(source.num_samples))
    labels = rows[:, LABELS][rows[:, LABELS] >= 0]
    starts = np.cumsum((0, *LENGTHS[:-1])) + 1
    predicted = set(range(1, sum(LENGTHS) + 1)) - set(starts.tolist())
    assert sorted(labels.tolist()) == sorted(token for token in predicted if token % 2 == 0)
    for tokens, answers, positions in zip(rows[:, TOKENS], rows[:, LABELS], rows[:, POSITIONS], strict=True):
        counted = answers >= 0
        assert (answers[counted] == tokens[counted] + 1).all()
        if packing == "padded":
            assert (positions == 0).sum() <= 2, "a sample and its padding"


def test_a_mask_is_part_of_what_the_data_is(chats, tmp_path):
    assert chats.identity == "bin/mask"
    assert chats.read_mask(1, 1, 2).tolist() == [0, 1]  # ids 7 and 8
    subset = chats.subset(np.array([2]), "some", "/part")
    assert subset.read_mask(0, 0, 3).tolist() == [0, 1, 0]  # ids 9, 10 and 11
    mask = tmp_path / f"chats{MASK_SUFFIX}"
    mask.write_bytes(mask.read_bytes()[:-1])
    with pytest.raises(BadInput, match="truncated, 18 bytes where chats.idx says 19"):
        TokenDataset(str(tmp_path / "chats"))
    mask.unlink()
    with pytest.raises(BadInput, match="chats.mask: no such file"):
        TokenDataset(str(tmp_path / "chats"))
    assert json.loads((tmp_path / "chats.meta.json").read_text())["mask_sha256"] == "mask"


def test_samples_weigh_alike_on_any_split():
    positions = [[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6, 7]]
    labels = [[-1, 5, 5, -1, 5, -1, -1, -1], [5, -1, -1, 5, 5, -1, 5, -1]]
    rows = np.array([[[1] * 8, labels[0], positions[0]], [[1] * 8, labels[1], positions[1]]])
    batch = with_sample_weights(build_packed_batch(rows, (0, 1)))
    expected = torch.tensor([[0, 0.5, 0.5, 0, 1, 0, 0, 0], [0.25, 0, 0, 0.25, 0.25, 0, 0.25, 0]])
    torch.testing.assert_close(batch.columns["weights"], expected)
    assert batch.columns["ends"].nonzero().tolist() == [[0, 2], [0, 4], [1, 6]]
    shares = [share_of(batch, rank, 2) for rank in range(2)]
    assert sum(int(share.columns["ends"].sum()) for share in shares) == 3
    assert sum(float(share.columns["weights"].sum()) for share in shares) == pytest.approx(3)
    empty = without_loss(batch, 1)
    assert int(empty.columns["ends"].sum()) == 2 and not empty.columns["weights"][1].any()
    assert with_document_lengths(batch).columns["lengths"][0].tolist() == [3, 3, 3, 2, 2, 3, 3, 3]
