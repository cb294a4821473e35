"""Which ranks are stragglers, from made-up seconds."""

from __future__ import annotations

from tests.pool import Place


def found(place: Place, seconds: list[float], pp_size: int) -> list[int]:
    from trainer.run.stragglers import find_stragglers

    return [one.rank for one in find_stragglers(seconds, pp_size)]


def test_a_rank_is_compared_with_those_that_have_its_work(ranks):
    """Of the first stage rank 1 is slow, of the second, which has more work, rank 6; ranks alone have no peers."""
    seconds = [0.1, 0.2, 0.1, 0.1, 0.4, 0.4, 0.6, 0.41]
    assert ranks.run(found, seconds, 2) == [[1, 6]]
    assert ranks.run(found, seconds, 8) == [[]]
    assert ranks.run(found, [0.1, 0.13], 1) == [[1]]


def test_small_differences_are_none(ranks):
    assert ranks.run(found, [0.1, 0.12, 0.1, 0.1], 1) == [[]]
    assert ranks.run(found, [0.001, 0.004, 0.001, 0.001], 1) == [[]]
