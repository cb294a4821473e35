"""What a rank does for a checkpoint does not grow with the ranks, and what rank 0 does, not with their square."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from tests.trainer.checkpoint.many_ranks import Rehearsal, World
from trainer.checkpoint import layout, shares
from trainer.checkpoint.shares import choose_writers, describe_shards, find_shared, id_of
from trainer.checkpoint.writing import check_whole

SIZES = (32, 128)


@pytest.fixture
def counts(tmp_path, monkeypatch):
    """Return what was counted of two saves and a load, by number of ranks."""
    monkeypatch.setattr(layout, "FILES_PER_DIRECTORY", 8)
    found = {}
    for size in SIZES:
        rehearsal = Rehearsal(World(size, tp=2, pp=2, layers=4), tmp_path / str(size))
        first, later = rehearsal.save(1), rehearsal.save(2)
        checkpoint = (tmp_path / str(size) / "checkpoints" / "latest").resolve()
        widest = max(len(list(place.iterdir())) for place in (checkpoint, *checkpoint.glob("part_*")))
        left = sorted(path.name for path in checkpoint.parent.iterdir())
        assert left == ["latest", checkpoint.name] and checkpoint.name == "step_00000002"
        found[size] = {"first": first, "later": later, "load": rehearsal.load([0, 1, size - 1]), "widest": widest}
    return found


def operations(figures):
    return sum(count for name, count in figures.items() if name not in ("received", "names listed"))


def test_counts_stay_with_the_number_of_ranks(counts):
    few, many = (counts[size] for size in SIZES)
    factor = SIZES[1] / SIZES[0]
    for what in ("first", "later", "load"):
        assert operations(many[what]["others"]) <= {"first": 6, "later": 16, "load": 9}[what], what
        assert many[what]["rank_0"].get("names listed", 0) <= SIZES[1] // 8 + 8, what
        assert many[what]["rank_0"]["received"] <= 1.05 * factor * few[what]["rank_0"]["received"], what
    assert operations(many["later"]["rank_0"]) <= 60 + 3 * SIZES[1] // 8  # directories, and the files of one of them
    assert many["later"]["others"]["unlink"] == 8
    assert max(few["later"]["others"]["received"], many["later"]["others"]["received"]) < 300
    # A load: what there is, once; the manifest and `.metadata` are rank 0's to read.
    assert many["load"]["others"]["received"] <= 1.05 * factor * few["load"]["others"]["received"]
    assert many["load"]["rank_0"]["open"] - many["load"]["others"]["open"] <= 4
    assert many["widest"] <= max(8, SIZES[1] // 8 + 3)


def shard(key, size, *, is_main, offset=0):
    return ShardedTensor(key, None, torch.float32, (size,), (1000,), (offset,), None, replica_id=int(not is_main))


def test_each_piece_is_written_once_and_evenly():
    """Four ranks hold eight weights alike; two experts lie on two ranks each; each has moments of its own."""
    tables = []
    for rank in range(4):
        weights = [shard(f"w{one}", 10, is_main=rank == 0) for one in range(8)]
        expert = shard("expert", 40, is_main=rank < 2, offset=40 * (rank % 2))
        tables.append(describe_shards([*weights, expert, shard(f"m{rank}", 5, is_main=True)]))
    chosen = choose_writers(tables)
    ids = [one for part in chosen for one in part]
    assert len(ids) == len(set(ids)) == 8 + 2 + 4
    sizes = {int(row[0]): int(row[1]) for table in tables for row in table}
    loads = [sum(sizes[one] for one in part) for part in chosen]
    assert sum(loads) == 4 * (8 * 10 + 2 * 40 + 4 * 5) and max(loads) <= 4 * 45
    held = [{int(row[0]) for row in table} for table in tables]
    assert all(part <= own for part, own in zip(chosen, held, strict=True))


def test_pieces_without_a_main_replica_in_the_group_are_another_groups():
    tables = [describe_shards([shard("norm", 3, is_main=False)]) for _ in range(2)]
    assert choose_writers(tables) == [frozenset(), frozenset()]


def test_pieces_that_the_first_save_did_not_deal_out_are_not_left_out(monkeypatch):
    """Nobody would write them, and the checkpoint would look whole."""
    monkeypatch.setattr(shares, "gather_tables", lambda table, group, device: [table, table[:0]])
    deal = shares.WriterShares(SimpleNamespace(size=lambda: 2, rank=lambda: 0), torch.device("cpu"))
    first = [shard("w", 3, is_main=True)]
    assert deal.mine(first) == deal.mine(first) == first
    with pytest.raises(ValueError, match="changed since the first save.*: moment"):
        deal.mine([*first, shard("moment", 3, is_main=True)])


def halves(*offsets):
    return [((offset, 0), (2, 4)) for offset in offsets]


def test_a_tensor_must_be_whole():
    check_whole("w", (4, 4), halves(2, 0))
    check_whole("scalar", (), [((), ())])
    with pytest.raises(ValueError, match="w: the ranks wrote 8 of its 16 elements"):
        check_whole("w", (4, 4), halves(0))
    with pytest.raises(ValueError, match=r"w: two ranks wrote what begins at \(1, 0\) and \(2, 0\)"):
        check_whole("w", (4, 4), halves(1, 2))
    random = np.random.default_rng(0).permutation(10_000)
    check_whole("experts", (10_000, 1), [((int(one), 0), (1, 1)) for one in random])


def test_what_all_ask_for_is_read_once():
    """Three ranks ask for two weights alike, two of them for an expert, each for moments of its own."""
    tables = []
    for rank in range(3):
        asked = [shard(f"w{one}", 10, is_main=False) for one in range(2)] + [shard(f"m{rank}", 5, is_main=True)]
        tables.append(describe_shards(asked + ([shard("expert", 8, is_main=True)] if rank else [])))
    readers = find_shared(tables)
    assert list(readers) == sorted(id_of(shard(f"w{one}", 10, is_main=False)) for one in range(2))
    assert len(set(readers.values())) == 2  # not one for all
