"""The blend: shares kept at every moment, the same whatever the steps, and a ledger that survives changes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from configs.errors import BadInput
from trainer.data.blend import Blend
from trainer.data.packed_source import PackedSource
from trainer.data.source import TokenSource

SEQ_LEN = 8


@pytest.fixture
def make_source(make_dataset):
    return lambda name, first=1: TokenSource(make_dataset(name, [50, 60, 70], first), SEQ_LEN, seed=3)


def draws(blend: Blend, steps: list[int]) -> tuple[list[int], list[int]]:
    taken = [blend.take(size) for size in steps]
    return np.concatenate([t.source for t in taken]).tolist(), np.concatenate([t.sample for t in taken]).tolist()


@pytest.mark.parametrize("weights", [[1.0], [0.7, 0.2, 0.1], [1, 1000], [3, 3, 3, 1e-4]])
def test_shares_are_kept_at_every_moment(make_source, weights):
    blend = Blend([make_source(str(number)) for number in range(len(weights))], weights)
    source, sample = draws(blend, [64] * 40)
    counts = np.cumsum(np.eye(len(weights))[source], axis=0)
    due = np.outer(np.arange(1, len(source) + 1), np.array(weights) / sum(weights))
    assert np.abs(counts - due).max() <= 1.01
    for number in range(len(weights)):  # each source is read in its own order, nothing left out
        own = [s for place, s in zip(source, sample, strict=True) if place == number]
        assert own == list(range(len(own)))


def test_the_order_does_not_hang_on_the_batch_size(make_source):
    def fresh():
        return Blend([make_source("a"), make_source("b"), make_source("c")], [5, 3, 0.1])

    expected = draws(fresh(), [240])
    for steps in ([1] * 240, [8] * 30, [7, 100, 33, 100], [239, 1]):
        assert draws(fresh(), steps) == expected


def test_rows_come_from_the_assigned_source(make_source):
    blend = Blend([make_source("a", 1), make_source("b", 1001)], [1, 2])
    assignment = blend.take(30)
    rows = np.array([4, 0, 29, 7])
    tokens = blend.read(assignment, rows).max(axis=1)
    assert ((tokens > 1000) == (assignment.source[rows] == 1)).all()


def test_the_ledger_is_plain_data_and_continues(make_source):
    blend = Blend([make_source("a"), make_source("b")], [5, 3])
    draws(blend, [37])
    state = json.loads(json.dumps(blend.state_dict()))
    again = Blend([make_source("a"), make_source("b")], [5, 3])
    again.load_state_dict(state)
    assert draws(again, [64, 3]) == draws(blend, [64, 3])
    assert again.state_dict() == blend.state_dict()


def test_sources_come_and_go_without_repeats(make_source):
    blend = Blend([make_source("a"), make_source("b")], [1, 1])
    draws(blend, [40])  # 20 of each
    second = Blend([make_source("b"), make_source("c")], [1, 1])
    second.load_state_dict(blend.state_dict())
    source, sample = draws(second, [20])
    assert [s for place, s in zip(source, sample, strict=True) if place == 0] == list(range(20, 30))
    assert [s for place, s in zip(source, sample, strict=True) if place == 1] == list(range(10))
    third = Blend([make_source("a")], [1])
    third.load_state_dict(second.state_dict())  # a comes back after a blend without it
    assert draws(third, [3]) == ([0, 0, 0], [20, 21, 22])
    assert third.consumed_samples == 63


def test_changed_weights_take_effect_at_once(make_source):
    blend = Blend([make_source("a"), make_source("b")], [9, 1])
    draws(blend, [100])
    changed = Blend([make_source("a"), make_source("b")], [1, 1])
    changed.load_state_dict(blend.state_dict())
    source, _ = draws(changed, [20])
    assert source.count(0) == source.count(1) == 10


def test_moved_data_goes_on_and_replaced_data_is_refused(make_source):
    blend = Blend([make_source("a")], [1])
    draws(blend, [5])
    moved = make_source("elsewhere")
    moved.dataset.identity = "identity of a"
    after = Blend([moved], [1])
    after.load_state_dict(blend.state_dict())
    assert draws(after, [1]) == ([0], [5])
    replaced = make_source("a")
    replaced.dataset.identity = "something new"
    with pytest.raises(BadInput, match="^a is not what the checkpoint read there; put .* under another run.name"):
        Blend([replaced], [1]).load_state_dict(blend.state_dict())


def test_another_length_is_refused(make_source, make_dataset):
    state = Blend([make_source("a")], [1]).state_dict()
    with pytest.raises(BadInput, match="train.seq_len: 16 differs from the 8.*checkpoint.init_from"):
        Blend([TokenSource(make_dataset("a", [50, 60]), 16, seed=3)], [1]).load_state_dict(state)


def test_another_packing_is_refused_and_old_ledgers_are_of_documents_end_to_end(make_source, make_dataset):
    packed = Blend([PackedSource(make_dataset("a", [50, 60]), SEQ_LEN, seed=3)], [1])
    state = Blend([make_source("a")], [1]).state_dict()
    for old in (state, {key: value for key, value in state.items() if key != "packing"}):
        with pytest.raises(BadInput, match="data.packing: best_fit differs from the concat of.*checkpoint.init_from"):
            packed.load_state_dict(old)
        Blend([make_source("a")], [1]).load_state_dict(old)
    with pytest.raises(BadInput, match="data.packing: concat differs from the best_fit of"):
        Blend([make_source("a")], [1]).load_state_dict(packed.state_dict())


def test_the_same_data_twice_and_no_data_are_refused(make_source):
    with pytest.raises(BadInput, match="same data"):
        Blend([make_source("a"), make_source("a")], [1, 1])
    with pytest.raises(BadInput, match="data.train"):
        Blend([], [])


def test_a_run_that_goes_on_with_other_data_tells_of_it(make_source, caplog):
    before = Blend([make_source("a"), make_source("b")], [1, 1])
    draws(before, [6])
    Blend([make_source("a"), make_source("b")], [1, 2]).load_state_dict(before.state_dict())
    assert not caplog.records
    Blend([make_source("a"), make_source("c")], [1, 1]).load_state_dict(before.state_dict())
    assert [record.getMessage() for record in caplog.records] == [
        "c is other data than the checkpoint's run read last",
        "b, of which 3 samples were read, is no longer read",
    ]
