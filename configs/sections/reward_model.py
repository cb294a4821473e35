"""The `reward` section: which answers are preferred to which, and how a model learns to score them. Torch-free."""

from __future__ import annotations

from typing import Literal

from configs.sections.base import NonNegativeFloat
from configs.sections.comparisons import ComparisonsSection


class RewardModelSection(ComparisonsSection):
    """A reward model: it scores an answer when it has read it, by the Bradley-Terry model of preferences.

    The loss of a pair is -log sigmoid(chosen - rejected - margin) (arXiv:2203.02155, eq. 1; arXiv:2307.09288, eq. 2);
    rows may have a column `margin`, by how much the chosen answer is better, 0 where there is none.
    """

    center_rewards_coefficient: NonNegativeFloat = 0.0
    """What the square of the sum of a pair's rewards is multiplied by and added to its loss, so that rewards lie around
    0 (arXiv:2312.09244, eq. 2; 0.01 there); 0 for none. TRL's name."""

    @property
    def rows(self) -> Literal["scored_pairs"]:
        """How rows are made of samples: whole pairs with every token of theirs read, best-fit."""
        return "scored_pairs"
