"""A rollout: one answer, or one conversation of several, with its reward. Plain data, the same on every rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.generate.stops import Finish

Key = tuple[int, int]
Values = Mapping[Key, NDArray[np.floating]]
"""Of the predictions of rollouts, `[tokens - 1]` each, by `Rollout.key`."""


@dataclass(frozen=True)
class Rollout:
    """What the policy did with one prompt, once."""

    source: str
    row: int
    """Of the prompt, in its source."""
    group: int
    """Number of the prompt among those of the step; rollouts of one group answer one prompt."""
    sample: int
    """Its number in the group."""
    token_ids: list[int]
    """Prompt, answers, and what stands between them, as the model saw and drew them: never encoded again."""
    is_sampled: list[bool]
    """Which of them the policy drew; as long as `token_ids`."""
    log_probs: list[float]
    """Of the tokens drawn, in order, in nats, under softmax(logits / temperature)."""
    finish: Finish
    """What ended the last answer."""
    texts: tuple[str, ...]
    """The answers without what ended them."""
    score: float | None
    """The weighted sum of its rewards; None where one of them failed, which leaves the rollout out of everything."""
    rewards: Mapping[str, float | None]
    """Each reward by name; None where it does not apply, or failed."""
    faults: Mapping[str, str]
    """Why rewards failed, by name."""

    @property
    def key(self) -> Key:
        """What names it among the rollouts of a step."""
        return self.group, self.sample

    @property
    def num_sampled(self) -> int:
        """Tokens that the policy drew."""
        return len(self.log_probs)

    def trained(self) -> NDArray[np.bool_]:
        """Return which predictions are the policy's, `[tokens - 1]`: prediction i is of token i + 1."""
        return np.array(self.is_sampled[1:], dtype=np.bool_)

    def lay(self, values: Sequence[float] | NDArray[np.floating]) -> NDArray[np.float64]:
        """Return values of the tokens drawn as values of predictions, 0 where the policy drew nothing."""
        column = np.zeros(len(self.token_ids) - 1)
        column[self.trained()] = values
        return column

    def record(self, step: int, spell: Callable[[Sequence[int]], str], advantage: float | None) -> dict[str, Any]:
        """Return what is kept of it in `rollouts/step_*.jsonl`; `spell` gives the text of tokens.

        The observations are what the policy saw between its answers, with the tokens that begin and end turns.
        """
        runs = groupby(zip(self.is_sampled, self.token_ids, strict=True), key=lambda pair: pair[0])
        prompt, *observations = [spell([token for _, token in run]) for is_sampled, run in runs if not is_sampled]
        return {
            "step": step, "source": self.source, "row": self.row, "group": self.group, "sample": self.sample,
            "prompt": prompt, "answers": list(self.texts), "observations": observations, "score": self.score,
            "rewards": dict(self.rewards), "faults": dict(self.faults), "advantage": advantage, "finish": self.finish,
            "num_prompt_tokens": self.is_sampled.index(True), "num_sampled_tokens": self.num_sampled,
        }  # fmt: skip
