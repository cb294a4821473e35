"""Packed rows: every prediction once an epoch, no document cut that fits, the same sample however it is come by."""

from __future__ import annotations

import numpy as np
import pytest

from configs.errors import BadInput
from trainer.data.packed_source import LABELS, POSITIONS, TOKENS, PackedSource

SEQ_LEN = 16
# Of one token, none, a row exactly (17 tokens are 16 predictions), one more, several rows, several rows exactly.
LENGTHS = [5, 1, 0, 17, 18, 40, 3, 12, 100, 7, 7, 2, 33, 9, 2, 4]


@pytest.fixture
def make_source(make_dataset):
    """Sources of documents without an end token: `make_dataset` numbers all tokens, and would end each in one token."""

    def make(name="a", seed=1, seq_len=SEQ_LEN, lengths=LENGTHS):
        dataset = make_dataset(name, lengths)
        dataset.documents = np.split(np.arange(1, 1 + sum(lengths)), np.cumsum(lengths)[:-1])
        return PackedSource(dataset, seq_len, seed)

    return make


def pieces_of(row: np.ndarray) -> list[np.ndarray]:
    """The documents of a row and its padding, int64 [3, length] each."""
    starts = np.flatnonzero(row[POSITIONS] == 0)
    assert starts[0] == 0
    pieces = np.split(row, starts[1:], axis=1)
    for piece in pieces:
        assert piece[POSITIONS].tolist() == list(range(piece.shape[1]))
    return pieces


def documents_of(rows: np.ndarray) -> list[tuple[int, ...]]:
    """The tokens of each piece of the rows and the label that ends it; padding is the last of a row and left out."""
    found = []
    for row in rows:
        *pieces, last = pieces_of(row)
        pieces += [] if (last[LABELS] == -1).all() else [last]
        for piece in pieces:
            assert (piece[LABELS, :-1] == piece[TOKENS, 1:]).all() and (piece[LABELS] >= 0).all()
            found.append((*piece[TOKENS].tolist(), int(piece[LABELS, -1])))
    return found


@pytest.mark.parametrize("seq_len", [1, 4, 16, 39, 500])
def test_every_document_is_read_once_and_whole_where_it_fits(make_source, seq_len):
    source = make_source(seq_len=seq_len)
    expected = [
        tuple(document[start : start + seq_len + 1].tolist())
        for document in source.dataset.documents
        for start in range(0, len(document) - 1, seq_len)
    ]
    for epoch in range(2):
        rows = source.read(np.arange(source.num_samples) + epoch * source.num_samples)
        assert sorted(documents_of(rows)) == sorted(expected)
        counted = int((rows[:, LABELS] >= 0).sum())
        assert counted == source.num_predictions == sum(max(length - 1, 0) for length in LENGTHS)
        assert 1 - counted / rows[:, LABELS].size == pytest.approx(source.padding_share)
    assert source.num_split == sum(length > seq_len + 1 for length in LENGTHS)


def test_padding_is_a_piece_of_its_own_that_counts_for_nothing(make_source):
    source = make_source(lengths=[6, 4])
    (row,) = source.read(np.array([0]))
    padding = pieces_of(row)[-1]
    assert padding[TOKENS].tolist() == [0] * 8 and padding[LABELS].tolist() == [-1] * 8


def test_a_sample_is_the_same_however_it_is_come_by(make_source):
    source = make_source()
    whole = source.read(np.arange(5 * source.num_samples))
    some = np.array([4 * source.num_samples, 0, 2 * source.num_samples + 1, 1])
    assert np.array_equal(make_source().read(some), whole[some])
    assert np.array_equal(source.read(some), whole[some])


def test_epochs_seeds_and_data_are_shuffled_each_in_its_own_way(make_source):
    lengths = np.random.default_rng(1).integers(2, 12, 200).tolist()
    sources = [make_source(lengths=lengths), make_source(lengths=lengths, seed=2), make_source("b", lengths=lengths)]
    epoch = np.arange(sources[0].num_samples)
    orders = [source.read(epoch) for source in sources] + [sources[0].read(epoch + len(epoch))]
    neighbours = [{frozenset(piece[TOKENS, 0] for piece in pieces_of(row)) for row in rows} for rows in orders]
    for number, rows in enumerate(orders):
        assert all(not np.array_equal(rows, other) for other in orders[:number])
        # Which documents share a row changes too, not the order of rows alone.
        assert all(len(neighbours[number] & other) < len(epoch) / 4 for other in neighbours[:number])


def test_the_rows_of_one_long_document_are_spread(make_source):
    source = make_source(lengths=[1 + 100 * SEQ_LEN])
    first_tokens = source.read(np.arange(100))[:, TOKENS, 0]
    assert sorted(first_tokens) == list(range(1, 1601, 16)) and np.abs(np.diff(first_tokens)).min() > 1
    assert np.median(np.abs(np.diff(first_tokens))) > 10 * SEQ_LEN


def test_data_without_a_prediction_is_refused(make_source):
    with pytest.raises(BadInput, match=r"data.train: no document of a has two tokens, .* work: data.packing=concat"):
        make_source(lengths=[1, 0, 1], seq_len=1)
    with pytest.raises(BadInput, match=r"no document of b has two tokens, .* predict; give data of longer documents"):
        make_source("b", lengths=[1, 0, 1], seq_len=2)
