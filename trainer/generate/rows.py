"""The rows of generation: what each has, which rank they go to, and which are in the cache now. Torch-free."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from trainer.generate.stops import Finish


@dataclass(frozen=True)
class Completion:
    """One answer."""

    prompt: int
    """Number of its prompt, from 0."""
    sample: int
    """Its number among the answers to that prompt, from 0."""
    token_ids: list[int]
    """What was drawn, a token or the tokens that stopped it included."""
    logprobs: list[float]
    """Of each token, in nats, under the distribution that it was drawn from (`draw_tokens`)."""
    full_logprobs: list[float]
    """The same under softmax(logits / temperature) over all ids, which is what a forward pass of training gives.

    Where neither top-k nor top-p left tokens out, and at temperature 0, this is the list `logprobs` itself.
    """
    finish: Finish
    """What ended it; "length" is the limit of new tokens or the model's context."""

    @property
    def answer_ids(self) -> list[int]:
        """The tokens of the answer, without the one that stopped it."""
        return self.token_ids[:-1] if self.finish == "stop_token" else self.token_ids


@dataclass
class Row:
    """An answer in the making."""

    prompt: int
    sample: int
    prompt_ids: Sequence[int]
    limit: int
    """New tokens at most."""
    random: np.random.Generator
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    full_logprobs: list[float] = field(default_factory=list)
    finish: Finish | None = None

    @property
    def num_cached(self) -> int:
        """Tokens in the cache: all but the newest, which the next pass takes."""
        return len(self.prompt_ids) + len(self.token_ids) - 1

    def completion(self) -> Completion:
        """Return the answer, which is finished."""
        assert self.finish is not None
        full = self.full_logprobs or self.logprobs
        return Completion(self.prompt, self.sample, self.token_ids, self.logprobs, full, self.finish)


def deal(
    lengths: Sequence[int], answers: Sequence[float], num_samples: int, num_ranks: int, rank: int
) -> Iterator[tuple[int, int]]:
    """Yield the (prompt, sample) that a rank answers: like work for all ranks, counted in tokens.

    Prompts have `lengths` tokens, and an answer to each is expected to have `answers`. All answers to a prompt go to
    one rank, which then computes the prompt once, unless there are fewer prompts than ranks. Most work first, each to
    the rank with the least so far.
    """
    each = num_samples if len(lengths) >= num_ranks else 1
    costs = [length + each * answer for length, answer in zip(lengths, answers, strict=True)]
    pieces = [(prompt, first) for prompt in range(len(lengths)) for first in range(0, num_samples, each)]
    work = [0.0] * num_ranks
    for prompt, first in sorted(pieces, key=lambda piece: -costs[piece[0]]):
        owner = work.index(min(work))
        work[owner] += costs[prompt]
        if owner == rank:
            yield from ((prompt, sample) for sample in range(first, first + each))


class Slots:
    """The rows in the cache, which are neighbours from slot 0 on, and those that wait."""

    def __init__(self, rows: Sequence[Row], num_slots: int) -> None:
        self.active: list[Row] = []
        self.waiting = deque(rows)
        self._num_slots = num_slots

    def take(self, most_tokens: int) -> list[Row]:
        """Return the waiting rows that come in now, behind the active ones, and hold their slots.

        Their prompts have `most_tokens` together, counted once each, or there is one prompt.
        """
        joining: list[Row] = []
        prompts: set[int] = set()
        total = 0
        while self.waiting and len(self.active) + len(joining) < self._num_slots:
            row = self.waiting[0]
            if row.prompt not in prompts:
                total += len(row.prompt_ids)
                if prompts and total > most_tokens:
                    break
                prompts.add(row.prompt)
            joining.append(self.waiting.popleft())
        self.active += joining
        return joining

    def drop_finished(self) -> Iterator[tuple[int, int]]:
        """Take out finished rows; yield for each the slot whose row takes its place, and that place."""
        for slot in reversed(range(len(self.active))):
            if self.active[slot].finish is not None:
                last = len(self.active) - 1
                self.active[slot] = self.active[last]
                yield last, slot
                self.active.pop()
