"""Pairs of rollouts: the best and the worst of each group, and what gives none."""

from __future__ import annotations

from tests.small_rollouts import make_rollout
from trainer.rl.pairs import pair_best_and_worst


def test_the_first_of_the_best_is_chosen_and_the_first_of_the_worst_rejected():
    scores = {0: (0.5, 1.0, 0.0, 1.0, 0.0), 1: (2.0, 2.0, 2.0), 2: (None, 3.0), 3: (None, -1.0, 4.0)}
    rollouts = [
        make_rollout((3, 5), group, sample, score=score)
        for sample in range(5)
        for group, some in scores.items()
        for score in some[sample : sample + 1]
    ]
    rollouts += [make_rollout((3, 5), 4, 0, score=float(sample)) for sample in (0, 1)]  # the same tokens
    found = pair_best_and_worst(rollouts, takes_cut=True)
    keys = [(chosen.key, rejected.key) for chosen, rejected in found.pairs]
    assert keys == [((0, 1), (0, 2)), ((3, 2), (3, 1))]
    assert (found.num_ties, found.num_short) == (2, 1)
    assert found.sides == {(0, 1): "chosen", (0, 2): "rejected", (3, 2): "chosen", (3, 1): "rejected"}
    assert found.describe()["pairs/score_margin"] == (1.0 + 5.0) / 2


def test_answers_that_the_limit_cut_are_left_out_on_demand():
    finishes = ("length", "stop_token", "stop_token")
    rollouts = [
        make_rollout((3, 5), 0, sample, score=float(sample), finish=finish) for sample, finish in enumerate(finishes)
    ]
    (whole,), (uncut,) = (pair_best_and_worst(rollouts, takes_cut=takes).pairs for takes in (True, False))
    assert [one.sample for one in whole] == [2, 0] and [one.sample for one in uncut] == [2, 1]
