"""What all tests share: the pool of ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.pool import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """The pool of worker processes; nothing starts before the first case."""
    pool = RankPool()
    yield pool
    pool.close()
