"""The pool itself: results by rank, failures that name the rank, and workers replaced after a crash or a hang."""

from __future__ import annotations

import os
import time

import pytest

from tests.pool import Place, RankFailed, RankPool


def add(place: Place, number: int) -> tuple[int, int, int]:
    return place.rank, place.world_size, number + place.rank


def raise_on_rank_1(place: Place) -> None:
    if place.rank == 1:
        raise ValueError("the reason")


def die_on_rank_1(place: Place) -> None:
    if place.rank == 1:
        os._exit(7)


def hang_on_rank_1(place: Place) -> None:
    if place.rank == 1:
        time.sleep(600)


def own_pid(place: Place) -> int:
    return os.getpid()


def sum_over_ranks(place: Place) -> float:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=place.init_method, rank=place.rank, world_size=place.world_size)
    total = torch.tensor(float(place.rank + 1))
    dist.all_reduce(total)
    return float(total)


def test_results_come_by_rank_and_workers_are_reused(ranks):
    assert ranks.run(add, 10, world=2) == [(0, 2, 10), (1, 2, 11)]
    assert ranks.run(own_pid, world=2) == ranks.run(own_pid, world=2)
    assert ranks.run(sum_over_ranks, world=2) == [3.0, 3.0]
    assert ranks.run(sum_over_ranks) == [1.0]


def test_an_exception_names_its_rank_and_keeps_the_workers(ranks):
    before = ranks.run(own_pid, world=2)
    with pytest.raises(RankFailed, match=r"rank 1: Traceback[\s\S]*the reason"):
        ranks.run(raise_on_rank_1, world=2)
    assert ranks.run(own_pid, world=2) == before


@pytest.mark.slow
def test_a_lost_rank_is_named_and_replaced():
    pool = RankPool()
    try:
        with pytest.raises(RankFailed, match="rank 1: died with exit code 7"):
            pool.run(die_on_rank_1, world=2)
        with pytest.raises(RankFailed, match="rank 1 did not answer in time and was killed"):
            pool.run(hang_on_rank_1, world=2, timeout=2)
        assert pool.run(add, 0) == [(0, 1, 0)]
    finally:
        pool.close()
