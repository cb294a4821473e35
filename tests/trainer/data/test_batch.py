"""Batches: labels, masks, positions and document boundaries."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from trainer.data.batch import build_batch, build_packed_batch, share_of, without_loss

EOD = 0
WINDOWS = np.array([[5, 6, EOD, 7, 8, 9, EOD], [EOD, EOD, 1, 2, 3, 4, 5]])


def test_plain_batches_count_every_token():
    batch = build_batch(WINDOWS, (10, 11))
    assert torch.equal(batch.tokens, torch.from_numpy(WINDOWS[:, :-1]))
    assert torch.equal(batch.labels, torch.from_numpy(WINDOWS[:, 1:]))
    assert batch.position_ids.tolist() == [list(range(6))] * 2
    assert batch.loss_mask.dtype == torch.float32 and batch.loss_mask.eq(1).all()
    assert batch.documents is None and batch.sample_ids == (10, 11)
    assert batch.num_attended_pairs((None,)) == 2 * 6**2


def test_document_masks_end_documents_after_their_last_token():
    batch = build_batch(WINDOWS, (0, 1), document_end_id=EOD)
    assert batch.documents is not None and batch.documents.cu_seqlens.dtype == torch.int32
    assert batch.documents.cu_seqlens.tolist() == [0, 3, 6, 7, 8, 12]
    assert batch.documents.max_seqlen == 4
    assert batch.num_attended_pairs((None,)) == 3**2 + 3**2 + 1 + 1 + 4**2
    # of 3 tokens 2, and of 4 tokens 2: all but a triangle of one, and of two, counted as squares
    assert batch.num_attended_pairs((None, 2)) == 36 + 36 - (1 + 1 + 0 + 0 + 4)
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2], [0, 0, 0, 1, 2, 3]]
    assert batch.loss_mask.tolist() == [[1, 1, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1]]


def test_an_end_at_the_row_end_makes_no_empty_document():
    batch = build_batch(np.array([[1, EOD, 2], [3, 4, 5]]), (0, 1), document_end_id=EOD)
    assert batch.documents is not None and batch.documents.cu_seqlens.tolist() == [0, 2, 4]


ROWS = np.array(
    [
        [[0, 6, 7, 0, 8, 0, 0, 0], [6, 7, 0, 8, 9, -1, -1, -1], [0, 1, 2, 0, 1, 0, 1, 2]],
        [[1, 2, 3, 4, 5, 6, 7, 8], [2, 3, 4, 5, 6, 7, 8, 9], [0, 1, 2, 3, 4, 5, 6, 7]],
    ]
)


def test_packed_documents_begin_where_positions_do():
    """Whatever the tokens are: 0, which pads, is also a token of the documents and a label that counts."""
    batch = build_packed_batch(ROWS, (8, 9))
    assert batch.tokens.tolist() == ROWS[:, 0].tolist() and batch.position_ids.tolist() == ROWS[:, 2].tolist()
    assert batch.labels.tolist() == [[6, 7, 0, 8, 9, 0, 0, 0], [2, 3, 4, 5, 6, 7, 8, 9]]
    assert batch.loss_mask.tolist() == [[1, 1, 1, 1, 1, 0, 0, 0], [1] * 8]
    assert batch.documents is not None and batch.documents.bounds == (0, 3, 5, 8, 16)
    assert batch.documents.cu_seqlens.tolist() == [0, 3, 5, 8, 16] and batch.documents.max_seqlen == 8
    assert batch.num_attended_pairs((None,)) == 3**2 + 2**2 + 3**2 + 8**2 and batch.sample_ids == (8, 9)
    shares = [share_of(batch, rank, 2) for rank in range(2)]
    assert sum(float(share.loss_mask.sum()) for share in shares) == 13
    assert shares[0].labels.tolist() == [[6, 7, 0, 0], [2, 3, 8, 9]] and shares[0].documents is batch.documents


def test_padding_rows_lose_their_loss_and_number():
    batch = build_batch(WINDOWS, (4, 5))
    padded = without_loss(batch, 1)
    assert padded.loss_mask.sum(dim=1).tolist() == [6, 0] and padded.sample_ids == (4, -1)
    assert batch.loss_mask.sum() == 12


def test_to_keeps_everything():
    batch = build_batch(WINDOWS, (4, 5), document_end_id=EOD)
    moved = batch.to(batch.tokens.device)
    assert torch.equal(moved.tokens, batch.tokens) and torch.equal(moved.loss_mask, batch.loss_mask)
    assert moved.documents is not None and moved.documents.max_seqlen == 4 and moved.sample_ids == (4, 5)


@pytest.mark.parametrize("document_end_id", [None, 3])
def test_shares_of_a_batch_are_the_batch(document_end_id):
    """Every token is on one rank, with its label, position, mask and columns; what is counted adds up."""
    windows = np.arange(2 * 17).reshape(2, 17) % 7
    whole = build_batch(windows, (4, 5), document_end_id)
    whole = replace(
        whole, columns={"advantages": torch.rand(whole.tokens.shape)}, sequences={"side": torch.tensor([0, 1])}
    )
    shares = [share_of(whole, rank, 4) for rank in range(4)]
    order = [0, 1, 14, 15, 2, 3, 12, 13, 4, 5, 10, 11, 6, 7, 8, 9]
    for name in ("tokens", "labels", "position_ids", "loss_mask"):
        joined = torch.cat([getattr(share, name) for share in shares], dim=1)
        assert torch.equal(joined, getattr(whole, name)[:, order]), name
    joined = torch.cat([share.columns["advantages"] for share in shares], dim=1)
    assert torch.equal(joined, whole.columns["advantages"][:, order])
    assert sum(share.num_attended_pairs((None, 5)) for share in shares) == whole.num_attended_pairs((None, 5))
    assert all(share.documents is whole.documents and share.sample_ids == (4, 5) for share in shares)
    assert all(share.sequences is whole.sequences for share in shares)
    assert share_of(whole, 0, 1) is whole
