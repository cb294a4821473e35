"""One source: every token once an epoch, in an order that hangs on seed, data and epoch alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from configs.errors import BadInput
from trainer.data.source import TokenSource

LENGTHS = [5, 1, 40, 3, 12, 0, 100, 7, 7, 2, 64, 31]


@pytest.mark.parametrize("seq_len", [1, 4, 16, 271])
def test_every_token_of_an_epoch_is_read_once(make_dataset, seq_len):
    dataset = make_dataset("a", LENGTHS)
    source = TokenSource(dataset, seq_len, seed=1)
    windows = source.read(np.arange(source.num_samples))
    met = Counter(windows[:, :-1].reshape(-1).tolist())
    everything = Counter(np.concatenate(dataset.documents).tolist())
    assert all(count <= everything[token] for token, count in met.items())
    assert (everything - met).total() == dataset.num_tokens - source.num_samples * seq_len <= seq_len


def test_labels_follow_on_and_documents_are_whole(make_dataset):
    dataset = make_dataset("a", LENGTHS)
    source = TokenSource(dataset, 16, seed=1)
    windows = source.read(np.arange(source.num_samples))
    following = {int(a): int(b) for document in dataset.documents for a, b in zip(document, document[1:], strict=False)}
    pairs = [(int(a), int(b)) for window in windows for a, b in zip(window, window[1:], strict=False) if a != 0]
    assert pairs and all(following[a] == b for a, b in pairs)


def test_epochs_and_seeds_differ_and_repeat(make_dataset):
    source = TokenSource(make_dataset("a", LENGTHS), 16, seed=1)
    n = source.num_samples
    first, second = source.read(np.arange(n)), source.read(np.arange(n, 2 * n))
    assert not np.array_equal(first, second)
    assert np.array_equal(first, TokenSource(make_dataset("a", LENGTHS), 16, seed=1).read(np.arange(n)))
    assert not np.array_equal(first, TokenSource(make_dataset("a", LENGTHS), 16, seed=2).read(np.arange(n)))
    assert not np.array_equal(first, TokenSource(make_dataset("b", LENGTHS), 16, seed=1).read(np.arange(n)))


def test_a_read_may_span_epochs_in_any_order(make_dataset):
    source = TokenSource(make_dataset("a", LENGTHS), 16, seed=1)
    whole = source.read(np.arange(5 * source.num_samples))
    some = np.array([4 * source.num_samples, 0, 2 * source.num_samples + 1, 1])
    assert np.array_equal(source.read(some), whole[some])


def test_windows_of_one_long_document_are_spread(make_dataset):
    source = TokenSource(make_dataset("a", [10_000]), 10, seed=1)
    first_tokens = source.read(np.arange(100))[:, 0]
    assert np.abs(np.diff(first_tokens)).min() > 10


def test_too_little_data_is_refused(make_dataset):
    with pytest.raises(BadInput, match=r"data.train: a has 272 tokens, fewer than .* = 273; .* would work: 271"):
        TokenSource(make_dataset("a", LENGTHS), 272, seed=1)
