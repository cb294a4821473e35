"""What all tests share: the pool of ranks, and which of the costly ones `make test-fast` takes."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tests.pool import RankPool

# Under `nohup`, and behind `&` in a script, they are ignored, which the launchers that tests start would heed.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
# Whole runs and parity start ranks and train: all of them are slow but one of each kind, on two ranks at most.
_COSTLY = ("tests/parity/", "tests/end_to_end/")
_FAST = {
    "test_layout_equals_one_rank[tp2_sp]",
    "test_layout_equals_one_rank[pp2]",
    "test_same_layout_bit_for_bit[one]",
    "test_another_layout[one-tp2_sp]",
    "test_experts_on_ranks_equal_one_rank[ep2]",
    "test_one_rank_equals_llama_in_float64",
    "test_a_run_leaves_everything_behind",
}
_FOUR_RANKS = ("tp2_pp2", "vpp2_dp2")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what trains on several ranks and is not listed above."""
    for item in items:
        is_costly = any(folder in item.path.as_posix() for folder in _COSTLY) and item.name not in _FAST
        if is_costly or any(layout in item.name for layout in _FOUR_RANKS):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """The pool of worker processes; nothing starts before the first case."""
    pool = RankPool()
    yield pool
    pool.close()
