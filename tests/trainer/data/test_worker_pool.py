"""Work shared among processes, of which this is one: order, errors in their turn, and no process for little work."""

from __future__ import annotations

import os
from concurrent.futures import Future

import pytest

from trainer.data.making.pool import WorkerPool


def double(worker: int, item: int) -> tuple[int, int]:
    """Return the process and the result; refuse 7."""
    if item == 7:
        raise ValueError("7 is bad")
    return os.getpid(), item * worker


def make(recipe: int) -> int:
    return recipe


@pytest.mark.parametrize(("num_items", "is_alone"), [(3, True), (7, False)])
def test_results_come_in_order_and_few_items_start_no_process(num_items, is_alone):
    pool = WorkerPool(make, 2, 2, num_workers=2)
    try:
        found = list(pool.in_order(double, range(num_items)))
    finally:
        pool.close()
    assert [(item, result) for item, (_, result) in found] == [(number, 2 * number) for number in range(num_items)]
    assert {process for _, (process, _) in found} == {os.getpid()} or not is_alone


def test_an_error_waits_for_its_turn():
    pool, found = WorkerPool(make, 2, 2, num_workers=2), []
    try:
        with pytest.raises(ValueError, match="7 is bad"):
            for item, _ in pool.in_order(double, range(12)):
                found.append(item)
    finally:
        pool.close()
    assert found == list(range(7))


class Asleep:
    """An executor whose processes never begin anything."""

    def submit(self, *unused) -> Future:
        return Future()

    def shutdown(self, **unused) -> None:
        pass


def test_what_no_process_has_begun_is_done_here_also_where_it_is_the_next(monkeypatch):
    pool = WorkerPool(make, 2, 2, num_workers=2)
    monkeypatch.setattr(pool, "_pool", Asleep())
    assert [result for _, (_, result) in pool.in_order(double, range(7))] == [0, 2, 4, 6, 8, 10, 12]
