"""Which of the ranks that hold the same piece of the state writes it, so that all of a group write about as much.

Every rank works that out alike from one small table a rank. Megatron-Core's own way sends each rank the descriptions of
all ranks' pieces, and takes time with the square of the group's size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica

from parallel.collectives import gather_tables

_ID, _BYTES, _IS_MAIN = range(3)


class WriterShares:
    """Decides once which pieces a rank writes; which rank holds what does not change while a run lasts."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        """Deal out what is alike on ranks of `group`, which sends tensors of `device`."""
        self._group = group
        self._device = device
        self._held: frozenset[int] = frozenset()
        self._mine: frozenset[int] | None = None

    def mine(self, shards: Iterable[ShardedTensor]) -> list[ShardedTensor]:
        """Return those of this rank's shards that it writes. Collective: all ranks of the group must call this.

        Raises ValueError where the shards are not those of the first call, for nobody would write what is new.
        """
        shards = list(shards)
        if self._group.size() == 1:
            return [shard for shard in shards if is_main_replica(shard.replica_id)]
        held = frozenset(id_of(shard) for shard in shards)
        if self._mine is None:
            self._held = held
            tables = gather_tables(describe_shards(shards), self._group, self._device)
            self._mine = choose_writers(tables)[self._group.rank()]
        if held != self._held:
            changed = [shard.key for shard in shards if id_of(shard) not in self._held] or ["what is gone"]
            raise ValueError(f"the state has changed since the first save, which dealt out its pieces: {changed[0]}")
        return [shard for shard in shards if id_of(shard) in self._mine]


def describe_shards(shards: Sequence[ShardedTensor]) -> np.ndarray:
    """Return a row for each shard, `[shards, 3]` int64: what identifies it, its bytes, whether it is the main one."""
    rows = [(id_of(shard), _num_bytes(shard), is_main_replica(shard.replica_id)) for shard in shards]
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


def choose_writers(tables: Sequence[np.ndarray]) -> list[frozenset[int]]:
    """Return, for each rank of a group, the ids of what it writes, given every rank's table.

    A piece is written in the group that has its main replica. What few ranks hold is dealt out first, then the largest,
    each to the rank that has least to write so far.
    """
    rows = np.concatenate(tables)
    ranks = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
    ids, first, inverse, num_holders = np.unique(
        rows[:, _ID], return_index=True, return_inverse=True, return_counts=True
    )
    is_here = np.zeros(len(ids), dtype=bool)
    is_here[inverse[rows[:, _IS_MAIN] == 1]] = True
    sizes = rows[first, _BYTES]
    holders = ranks[np.argsort(inverse, kind="stable")]
    ends = np.cumsum(num_holders)
    loads = np.zeros(len(tables), dtype=np.int64)
    chosen: list[set[int]] = [set() for _ in tables]
    for piece in np.lexsort((ids, -sizes, num_holders)):
        if is_here[piece]:
            among = holders[ends[piece] - num_holders[piece] : ends[piece]]
            writer = among[np.argmin(loads[among])]
            loads[writer] += sizes[piece]
            chosen[writer].add(int(ids[piece]))
    return [frozenset(one) for one in chosen]


def find_shared(tables: Sequence[np.ndarray]) -> dict[int, int]:
    """Return which rank of a group reads each of the pieces that all of them ask for, in the order of their ids."""
    asked = [table.copy() for table in tables]
    for table in asked:
        table[:, _IS_MAIN] = 1  # else it would be left to another group
    readers = {one: rank for rank, chosen in enumerate(choose_writers(asked)) for one in chosen}
    ids, counts = np.unique(np.concatenate(tables)[:, _ID], return_counts=True)
    return {int(one): readers[int(one)] for one, count in zip(ids, counts, strict=True) if count == len(tables)}


def id_of(shard: Any) -> int:
    """Return what identifies a piece on every rank: a hash of its key and place."""
    digest = blake2b(f"{shard.key} {shard.global_offset}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _num_bytes(shard: ShardedTensor) -> int:
    return int(np.prod(shard.local_shape)) * shard.dtype.itemsize
