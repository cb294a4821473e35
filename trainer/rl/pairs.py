"""Rollouts -> pairs of answers: the best and the worst of each group, and the pairs of a round as data in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from parallel.mesh import Mesh
from trainer.data.indexed import MemoryDataset
from trainer.data.packed_source import CHOSEN, REJECTED
from trainer.engine.parts import SavedState
from trainer.engine.sharded_state import share_state
from trainer.rl.reference_scores import ReferenceScores
from trainer.rl.rollout import Key, Rollout

_PARTS = ("round.tokens", "round.sides", "round.lengths")
_TYPES = (torch.int32, torch.uint8, torch.int32)


@dataclass(frozen=True)
class Paired:
    """What became of the groups of some rollouts."""

    pairs: list[tuple[Rollout, Rollout]]
    """Chosen and rejected."""
    num_ties: int
    """Groups of one score, or whose best and worst answers are the same tokens."""
    num_short: int
    """Groups with fewer than two answers that have a score and may be trained."""

    @property
    def sides(self) -> dict[Key, str]:
        """Which side each rollout of a pair is on."""
        names = ("chosen", "rejected")
        return {one.key: name for pair in self.pairs for one, name in zip(pair, names, strict=True)}

    def describe(self) -> dict[str, float]:
        """Return the figures of a round."""
        margins = [_score(chosen) - _score(rejected) for chosen, rejected in self.pairs]
        return {
            "pairs/num_pairs": float(len(self.pairs)),
            "pairs/num_ties": float(self.num_ties),
            "pairs/num_short": float(self.num_short),
            "pairs/score_margin": float(np.mean(margins)) if margins else 0.0,
        }


def pair_best_and_worst(rollouts: Sequence[Rollout], *, takes_cut: bool) -> Paired:
    """Return a pair of each group, in order: the first of its best answers and the first of its worst.

    Answers without a score are in none, nor, unless `takes_cut`, those that the limit of tokens cut.
    """
    pairs, num_ties, num_short = [], 0, 0
    groups: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.group, []).append(rollout)
    for group in groups.values():
        usable = [one for one in group if one.score is not None and (takes_cut or one.finish != "length")]
        if len(usable) < 2:
            num_short += 1
            continue
        best, worst = max(usable, key=_score), min(usable, key=_score)
        if _score(best) == _score(worst) or best.token_ids == worst.token_ids:
            num_ties += 1
        else:
            pairs.append((best, worst))
    return Paired(pairs, num_ties, num_short)


class RoundPairs:
    """The pairs of the round under way, and what the reference says of them: the same on every rank.

    As a part of checkpoints it lets a run go on within a round without answering anything again.
    """

    def __init__(self, mesh: Mesh, scores: ReferenceScores | None) -> None:
        """`scores` are kept with the pairs; None where the loss has no reference."""
        self._mesh, self._scores = mesh, scores
        self.dataset: MemoryDataset | None = None
        """Documents 2i and 2i + 1 are a pair, their sides in the mask of what the policy drew; None before a round."""

    def hold(self, pairs: Sequence[tuple[Rollout, Rollout]]) -> None:
        """Take the pairs of a new round in the place of the last one's."""
        answers = [(one, side) for pair in pairs for one, side in zip(pair, (CHOSEN, REJECTED), strict=True)]
        self._open(
            np.concatenate([np.array(one.token_ids, dtype=np.int32) for one, _ in answers]),
            np.concatenate([np.array(one.is_sampled, dtype=np.uint8) * np.uint8(side) for one, side in answers]),
            np.array([len(one.token_ids) for one, _ in answers], dtype=np.int32),
        )
        if self._scores is not None:
            self._scores.forget()

    def sharded_state(self, saved: SavedState | None) -> dict[str, Any]:
        """Return the round's pairs with their scores; nothing before the first round."""
        if saved is None:
            if self.dataset is None:
                return {}
            tensors = self._tensors
        elif _PARTS[0] not in saved.shapes:
            return {}
        else:
            tensors = [torch.empty(saved.shapes[name], dtype=kind) for name, kind in zip(_PARTS, _TYPES, strict=True)]
        state = share_state(dict(zip(_PARTS, tensors, strict=True)), self._mesh)
        return state if self._scores is None else state | self._scores.sharded_state(saved)

    def load(self, loaded: dict[str, Any]) -> None:
        """Take what was saved."""
        if loaded:
            self._open(*(loaded[name].numpy() for name in _PARTS))
            if self._scores is not None:
                self._scores.load(loaded)

    def _open(self, tokens: NDArray[np.int32], sides: NDArray[np.uint8], lengths: NDArray[np.int32]) -> None:
        self._tensors = [torch.from_numpy(part) for part in (tokens, sides, lengths)]
        self.dataset = MemoryDataset("the answers of this round", tokens, sides, lengths)


def _score(rollout: Rollout) -> float:
    assert rollout.score is not None
    return rollout.score
