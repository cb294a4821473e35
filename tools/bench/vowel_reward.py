"""The reward of the benchmarks of reinforcement learning, ours and TRL's: something any text has some of."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.environments.rewards.reply import Reply


def share_of_vowels(reply: Reply) -> float:
    """Return the share of vowels among the characters of an answer."""
    return count_vowels(reply.text)


def count_vowels(text: str) -> float:
    """Return the share of vowels among the characters of a text."""
    return sum(letter in "aeiou" for letter in text) / max(len(text), 1)
