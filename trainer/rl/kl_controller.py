"""What the divergence from the reference is multiplied by in the rewards: one coefficient, or one that adapts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from configs.sections.ppo import LARGEST_ERROR, AdaptiveKlSection


class KlController:
    """The coefficient of a step, moved after it towards a target (arXiv:1909.08593, section 2.2).

    With e = (KL - target) / target, within 0.2 of 0, the next coefficient is b (1 + e n / horizon), n answers having
    been drawn, as in that paper's code, whose e is multiplied by 0.1 in the paper. KL is that of a whole answer, in
    nats, summed over its tokens, its mean over answers.
    """

    def __init__(self, coefficient: float, adaptive: AdaptiveKlSection | None) -> None:
        self.coefficient = coefficient
        self._adaptive = adaptive

    def update(self, divergence: float, num_answers: int) -> None:
        """Move the coefficient after a step in which answers diverged so far; without a target it stays."""
        if self._adaptive is None or not num_answers:
            return
        error = divergence / self._adaptive.target - 1
        error = min(max(error, -LARGEST_ERROR), LARGEST_ERROR)
        self.coefficient *= 1 + error * num_answers / self._adaptive.horizon

    def state_dict(self) -> Mapping[str, Any]:
        """Return the coefficient of the next step."""
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with a coefficient that has adapted; one that does not is the config's."""
        if self._adaptive is not None:
            self.coefficient = state["coefficient"]
