"""The reader: the same samples on every layout and after a restart anywhere, read ahead without anyone noticing."""

from __future__ import annotations

import threading
import time
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch

from configs.errors import BadInput
from trainer.data.blend import Blend
from trainer.data.packed_source import SOURCES
from trainer.data.reader import BatchReader, ValidationReader
from trainer.data.source import TokenSource

SEQ_LEN = 8


@pytest.fixture
def make_reader(make_dataset):
    opened = []

    def make(dp_rank=0, dp_size=1, micro_batch_size=1, size_at=lambda consumed: 16, packing="concat", **options):
        datasets = [make_dataset("a", [50, 60, 70, 300], 1), make_dataset("b", [90, 11, 200, 3, 4, 5], 1001)]
        if packing == "scored_pairs":  # which rows hold whole
            datasets = [make_dataset("a", [3, 5, 2, 6, 4, 4, 1, 2], 1), make_dataset("b", [2, 3, 5, 3], 1001)]
        blend = Blend([SOURCES[packing](dataset, SEQ_LEN, seed=5) for dataset in datasets], [2, 1])
        reader = BatchReader(
            blend,
            micro_batch_size=micro_batch_size,
            dp_rank=dp_rank,
            dp_size=dp_size,
            global_batch_size_at=size_at,
            vocab_size=2000,
            **options,
        )
        opened.append(reader)
        return reader

    yield make
    for reader in opened:
        reader.close()


def samples_of(steps) -> dict[int, tuple[int, ...]]:
    """Global sample number -> its tokens, labels, positions and what counts."""
    found: dict[int, tuple[int, ...]] = {}
    for batches in steps:
        for batch in batches:
            columns = torch.stack([batch.tokens, batch.labels, batch.position_ids, batch.loss_mask.long()], dim=1)
            for number, row in zip(batch.sample_ids, columns, strict=True):
                assert number not in found
                found[number] = tuple(row.flatten().tolist())
    return found


@pytest.mark.parametrize("packing", SOURCES)
def test_every_layout_reads_the_same_samples(make_reader, packing):
    make_reader = partial(make_reader, packing=packing)
    reader = make_reader()
    expected = [samples_of([reader.read_step()]) for _ in range(6)]
    assert [min(step) for step in expected] == [0, 16, 32, 48, 64, 80]
    for dp_size, micro_batch_size in [(1, 4), (2, 1), (2, 8), (4, 2), (4, 1)]:
        readers = [make_reader(rank, dp_size, micro_batch_size) for rank in range(dp_size)]
        for step in expected:
            assert samples_of(reader.read_step() for reader in readers) == step


def test_microbatches_are_laid_out_as_promised(make_reader):
    reader = make_reader(dp_rank=1, dp_size=2, micro_batch_size=4)
    assert [batch.sample_ids for batch in reader.read_step()] == [(4, 5, 6, 7), (12, 13, 14, 15)]
    assert [batch.sample_ids for batch in reader.read_step()] == [(20, 21, 22, 23), (28, 29, 30, 31)]


@pytest.mark.parametrize("packing", SOURCES)
@pytest.mark.parametrize("stop_after", [0, 1, 2, 5])
def test_a_restart_anywhere_goes_on_even_on_another_layout(make_reader, stop_after, packing):
    make_reader = partial(make_reader, packing=packing)
    uninterrupted = make_reader()
    steps = [samples_of([uninterrupted.read_step()]) for _ in range(8)]
    first = make_reader(prefetch_steps=3)
    for _ in range(stop_after):
        first.read_step()
    time.sleep(0.02)  # let it read ahead: the state must not show it
    state = first.state_dict()
    assert state["consumed_samples"] == first.consumed_samples == 16 * stop_after
    second = [make_reader(rank, 2, 2) for rank in range(2)]
    for reader in second:
        reader.load_state_dict(state)
    for step in steps[stop_after:]:
        assert samples_of(reader.read_step() for reader in second) == step


def test_loading_and_closing_drop_what_was_read_ahead(make_reader):
    reader = make_reader()
    steps = [samples_of([reader.read_step()]) for _ in range(2)]
    state = reader.state_dict()
    third = samples_of([reader.read_step()])
    reader.load_state_dict(state)
    assert samples_of([reader.read_step()]) == third != steps[1]
    reader.close()
    assert min(samples_of([reader.read_step()])) == 48


def test_the_batch_may_grow(make_reader):
    def size_at(consumed: int) -> int:
        return 4 if consumed < 8 else 8

    reader = make_reader(dp_size=2, size_at=size_at)
    assert [len(reader.read_step()) for _ in range(4)] == [2, 2, 4, 4]
    assert reader.consumed_samples == 24


def test_document_masks_reach_the_batch(make_reader):
    plain, masked = make_reader().read_step(), make_reader(document_end_id=0).read_step()
    assert all(batch.documents is None for batch in plain)
    ends = [int((batch.tokens == 0).sum()) for batch in masked]
    assert sum(ends) > 0
    assert [int((batch.loss_mask == 0).sum()) for batch in masked] == ends
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(plain, masked, strict=True))


def test_packed_rows_bound_their_documents_themselves(make_reader):
    batches = make_reader(packing="best_fit", micro_batch_size=4).read_step()
    for batch in batches:
        assert batch.documents is not None
        assert batch.documents.bounds[:-1] == tuple(np.flatnonzero(batch.position_ids.flatten() == 0))
    assert any(len(batch.documents.bounds) > 5 for batch in batches)
    assert all(int(batch.labels.min()) >= 0 for batch in batches)


def test_errors_of_the_thread_reach_the_caller(make_reader):
    reader = make_reader(dp_size=3)
    with pytest.raises(BadInput, match=r"train.global_batch_size: 16 is not a multiple .* = 3; .* work: 15"):
        reader.read_step()
    broken = make_reader()
    broken.read_step()

    def fail(*_: object) -> np.ndarray:
        raise OSError("the disk is gone")

    for source in broken._blend.sources:
        source.dataset.read = fail
    with pytest.raises(OSError, match="the disk is gone"):
        for _ in range(8):
            broken.read_step()
    assert all("_read_ahead" not in thread.name for thread in threading.enumerate())


@pytest.mark.parametrize("num_samples, dp_size, micro_batch_size", [(16, 2, 4), (13, 2, 4), (5, 4, 2), (1, 4, 1)])
def test_validation_counts_every_sample_once(make_dataset, num_samples, dp_size, micro_batch_size):
    readers = [
        ValidationReader(
            make_dataset("v", [200, 300]),
            seq_len=SEQ_LEN,
            num_samples=num_samples,
            micro_batch_size=micro_batch_size,
            dp_rank=rank,
            dp_size=dp_size,
            vocab_size=2000,
        )
        for rank in range(dp_size)
    ]
    batches = [list(reader.batches()) for reader in readers]
    assert {len(own) for own in batches} == {readers[0].num_microbatches}
    flat = [batch for own in batches for batch in own]
    numbers = [number for batch in flat for number in batch.sample_ids if number >= 0]
    assert sorted(numbers) == list(range(num_samples))
    assert sum(float(batch.loss_mask.sum()) for batch in flat) == num_samples * SEQ_LEN
    again = list(readers[0].batches())
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(again, batches[0], strict=True))


def test_packed_validation_counts_every_prediction_of_a_small_source_once(make_dataset):
    reader = ValidationReader(
        make_dataset("v", [5, 30, 9, 4]),
        seq_len=SEQ_LEN,
        num_samples=100,
        micro_batch_size=4,
        dp_rank=0,
        dp_size=1,
        vocab_size=2000,
        packing="best_fit",
    )
    assert reader.num_samples == 6
    assert sum(float(batch.loss_mask.sum()) for batch in reader.batches()) == 4 + 29 + 8 + 3


def test_ids_outside_the_vocabulary_are_refused(make_dataset):
    """Split over tp, an embedding would take them for nothing and the run would learn on in silence."""
    blend = Blend([TokenSource(make_dataset("a", [300], 1), SEQ_LEN, seed=5)], [1])
    reader = BatchReader(
        blend, micro_batch_size=1, dp_rank=0, dp_size=1, global_batch_size_at=lambda consumed: 30, vocab_size=100
    )
    with pytest.raises(BadInput, match="data.train: a token of .* is [0-9]+, and model.vocab_size=100 has no such id"):
        reader.read_step()


@pytest.mark.parametrize("vocab_size", [250, 251])
def test_positions_are_no_ids_and_the_last_label_is_one(make_dataset, vocab_size):
    dataset = make_dataset("a", [301], 1)
    dataset.documents[0][:] = [*[7] * 300, 250]  # 250 is the last label alone
    reader = ValidationReader(
        dataset,
        seq_len=300,
        num_samples=1,
        micro_batch_size=1,
        dp_rank=0,
        dp_size=1,
        vocab_size=vocab_size,
        packing="best_fit",
    )
    with pytest.raises(BadInput, match="is 250, and") if vocab_size == 250 else nullcontext():
        reader.check()


def test_validation_never_repeats_a_small_source(make_dataset):
    reader = ValidationReader(
        make_dataset("v", [41]),
        seq_len=SEQ_LEN,
        num_samples=100,
        micro_batch_size=2,
        dp_rank=0,
        dp_size=1,
        vocab_size=2000,
    )
    assert reader.num_samples == 5 and reader.num_microbatches == 3
