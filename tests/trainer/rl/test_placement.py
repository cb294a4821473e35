"""Rollouts in rows: each lies somewhere once, whole, and what is said of its predictions comes back to it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.small_rollouts import make_rollout, make_rollouts
from trainer.data.batch import Batch
from trainer.rl.placement import Placement

SEQ_LEN = 40
ROLLOUTS = make_rollouts()
LENGTHS = [len(rollout.token_ids) - 1 for rollout in ROLLOUTS]


def place(dp_size: int, micro_batch_size: int, vpp_size: int = 1, lengths: list[int] = LENGTHS) -> list[Placement]:
    """Return the placement as each data-parallel rank has it."""
    meshes: list[Any] = [
        SimpleNamespace(dp_size=dp_size, dp_rank=rank, pp_size=2, vpp_size=vpp_size) for rank in range(dp_size)
    ]
    return [Placement(lengths, SEQ_LEN, micro_batch_size, mesh) for mesh in meshes]


def documents_of(batch: Batch) -> list[tuple[tuple[int, ...], ...]]:
    """Return tokens, labels (-1 where they do not count) and positions of each document of a microbatch."""
    assert batch.documents is not None
    labels = np.where(batch.loss_mask.numpy() > 0, batch.labels.numpy(), -1)
    parts = [part.flatten().tolist() for part in (batch.tokens.numpy(), labels, batch.position_ids.numpy())]
    bounds = batch.documents.bounds
    return [tuple(tuple(part[start:end]) for part in parts) for start, end in zip(bounds[:-1], bounds[1:], strict=True)]


def expected_documents() -> list[tuple[tuple[int, ...], ...]]:
    """Return what each rollout is as a document: a label counts where the policy drew it."""
    found = []
    for rollout in ROLLOUTS:
        ids, drawn = rollout.token_ids, rollout.is_sampled
        labels = tuple(ids[i] if drawn[i] else -1 for i in range(1, len(ids)))
        found.append((tuple(ids[:-1]), labels, tuple(range(len(ids) - 1))))
    return found


@pytest.mark.parametrize(("dp_size", "micro_batch_size", "vpp_size"), [(1, 1, 1), (2, 1, 1), (2, 2, 2), (3, 4, 1)])
def test_every_rollout_is_one_document(dp_size, micro_batch_size, vpp_size):
    placements = place(dp_size, micro_batch_size, vpp_size)
    built = [placement.build(ROLLOUTS) for placement in placements]
    in_turn = 2 if vpp_size > 1 else 1
    assert len({len(batches) for batches in built}) == 1 and len(built[0]) % in_turn == 0
    documents = []
    for batches in built:
        for batch in batches:
            assert batch.tokens.shape == (micro_batch_size, SEQ_LEN)
            assert batch.documents is not None
            assert not set(range(0, batch.tokens.numel(), SEQ_LEN)) - set(batch.documents.bounds)
            documents += documents_of(batch)
    trained = [document for document in documents if any(label >= 0 for label in document[1])]
    assert sorted(trained) == sorted(expected_documents())
    padding = [document for document in documents if all(label < 0 for label in document[1])]
    assert all(set(tokens) == {0} for tokens, _, _ in padding)
    assert len(padding) <= placements[0].num_rows, "a row has at most one document of padding"
    padded = sum(len(tokens) for tokens, _, _ in padding) / (placements[0].num_rows * SEQ_LEN)
    assert placements[0].padding_share == pytest.approx(padded)


def test_rows_are_the_same_whoever_takes_them():
    """Microbatch by microbatch, the ranks have the rows of one rank that takes them all."""
    alone = [batch.tokens.numpy() for batch in place(1, 4)[0].build(ROLLOUTS)]
    shared = [placement.build(ROLLOUTS) for placement in place(2, 2)]
    for number, whole in enumerate(alone):
        np.testing.assert_array_equal(np.concatenate([batches[number].tokens.numpy() for batches in shared]), whole)


@pytest.mark.parametrize(("dp_size", "micro_batch_size"), [(1, 3), (2, 1), (3, 2)])
def test_values_come_back_from_where_they_were_laid(dp_size, micro_batch_size):
    random = np.random.default_rng(0)
    values = [random.normal(size=length).astype(np.float32) for length in LENGTHS]
    placements = place(dp_size, micro_batch_size)
    columns = [[column.numpy() for column in placement.column(values)] for placement in placements]
    for placement in placements:
        for found, expected in zip(placement.take_back(columns), values, strict=True):
            np.testing.assert_array_equal(found, expected)
    assert sum(np.count_nonzero(column) for own in columns for column in own) == sum(LENGTHS), "else 0"


def test_a_value_lies_where_its_prediction_is_made():
    """Laid as a column, the token that is predicted stands where the label stands."""
    labels = [np.array(rollout.token_ids[1:], dtype=np.float32) for rollout in ROLLOUTS]
    for placement in place(2, 2):
        for batch, column in zip(placement.build(ROLLOUTS), placement.column(labels), strict=True):
            counts = batch.loss_mask > 0
            assert (batch.labels[counts] == column[counts]).all()


def test_without_rollouts_each_rank_has_a_microbatch_of_padding():
    for placement in place(2, 3, lengths=[]):
        (batch,) = placement.build([])
        assert not batch.loss_mask.any() and batch.documents is not None
        assert batch.documents.bounds == (0, SEQ_LEN, 2 * SEQ_LEN, 3 * SEQ_LEN)
        assert placement.padding_share == 1 and not placement.column([])[0].any()
        assert placement.take_back([[np.zeros((3, SEQ_LEN))]] * 2) == []


def test_a_rollout_may_fill_its_row():
    (placement,) = place(1, 1, lengths=[SEQ_LEN])
    (batch,) = placement.build([make_rollout((1, SEQ_LEN))])
    assert batch.documents is not None
    assert batch.documents.bounds == (0, SEQ_LEN) and batch.loss_mask.all() and placement.padding_share == 0
