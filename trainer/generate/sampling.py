"""How the next token is drawn: the settings, and logits -> token and log-probability as a pure function.

A row's random numbers come from (seed, key of its prompt, sample) alone, so that what is drawn for it depends neither
on the rows beside it nor on the layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from configs.errors import BadInput

_LARGEST_UNIFORM = 1 - 1e-12  # so that rounding draws nothing beyond the last token
_END_OF_WORDS = 2**32  # numpy's seeds are made of such


@dataclass(frozen=True)
class Sampling:
    """What is generated for each prompt. Raises BadInput for values that mean nothing."""

    max_new_tokens: int
    """Tokens of an answer at most, one that stops it included."""
    temperature: float = 1.0
    """What logits are divided by; 0 takes the likeliest token, of equal ones the one with the lowest id."""
    top_k: int | None = None
    """Draw from so many likeliest tokens; None for all."""
    top_p: float = 1.0
    """Of these, draw from the fewest likeliest that together have this probability (Holtzman et al. 2019,
    arXiv:1904.09751)."""
    stop_tokens: tuple[int, ...] = ()
    """Ids that end an answer; the one that did is its last token."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end an answer, special tokens spelled out, also where they begin or end inside a token."""
    num_samples: int = 1
    """Answers to each prompt."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("num_samples", 1), ("seed", 0), ("top_k", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise BadInput(f"{name}: {value} is too few; a value that would work: {least}")
        if not 0 <= self.temperature < float("inf"):
            raise BadInput(f"temperature: {self.temperature} is not 0 or more; a value that would work: 1.0")
        if not 0 < self.top_p <= 1:
            raise BadInput(f"top_p: {self.top_p} is not above 0 and at most 1; a value that would work: 0.95")
        if "" in self.stop_strings:
            raise BadInput("stop_strings: an empty text would stop every answer at once; leave it out")

    @property
    def leaves_out(self) -> bool:
        """Whether top-k or top-p may leave tokens out of the distribution that is drawn from."""
        return self.temperature > 0 and (self.top_k is not None or self.top_p < 1)


def row_random(sampling: Sampling, key: Sequence[int], sample: int) -> np.random.Generator:
    """Return the random numbers of an answer to the prompt of this key, whose seed is [sampling.seed, *key, sample]."""
    return np.random.default_rng([sampling.seed, *key, sample])


def check_keys(keys: Sequence[Sequence[int]], num_prompts: int) -> None:
    """Raise BadInput unless each prompt has a key, of as many numbers as the others, each below 2^32.

    Else two keys could be one seed: numpy fills seeds up with zeros, and splits larger numbers.
    """
    if len(keys) != num_prompts:
        raise BadInput(f"keys: {len(keys)} for {num_prompts} prompts; give one for each")
    for number, key in enumerate(keys):
        if len(key) != len(keys[0]) or not all(0 <= one < _END_OF_WORDS for one in key):
            raise BadInput(
                f"keys: that of prompt {number} is {list(key)}; give {len(keys[0])} numbers, as for prompt 0, each "
                f"from 0 to {_END_OF_WORDS - 1}"
            )


class Drawn(NamedTuple):
    """A token for each row, and its log-probabilities in nats; all `[rows]`."""

    tokens: torch.Tensor
    log_probs: torch.Tensor
    """Of the distribution drawn from: after temperature, top-k and top-p."""
    full_log_probs: torch.Tensor
    """Of softmax(logits / temperature); the same tensor where nothing is left out."""


def draw_tokens(logits: torch.Tensor, sampling: Sampling, uniforms: torch.Tensor) -> Drawn:
    """Draw a token for each row of fp32 `logits [rows, vocab]` with a number of [0, 1) each.

    The token is the first, by id, at which the distribution function exceeds the row's number. At temperature 0, where
    the likeliest token has all of it, log-probabilities are those of softmax(logits).
    """
    if sampling.temperature == 0:
        tokens = logits.argmax(dim=-1)
        log_probs = _log_probs(logits, tokens)
        return Drawn(tokens, log_probs, log_probs)
    whole = logits / sampling.temperature
    scaled, ids = whole, None
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        ids = scaled.topk(sampling.top_k, dim=-1).indices.sort(dim=-1).values
        scaled = scaled.gather(-1, ids)
    if sampling.top_p < 1:
        scaled = scaled.masked_fill(~_nucleus(scaled, sampling.top_p), -torch.inf)
    distribution = torch.softmax(scaled, dim=-1, dtype=torch.float64).cumsum(dim=-1)
    wanted = uniforms.clamp(max=_LARGEST_UNIFORM).unsqueeze(-1) * distribution[:, -1:]
    chosen = torch.searchsorted(distribution, wanted, right=True).squeeze(-1)
    tokens = chosen if ids is None else ids.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
    log_probs = _log_probs(scaled, chosen)
    return Drawn(tokens, log_probs, log_probs if scaled is whole else _log_probs(whole, tokens))


def _nucleus(scaled: torch.Tensor, top_p: float) -> torch.Tensor:
    """Return which of the logits `[rows, n]` are among the fewest likeliest that have the probability `top_p`."""
    probabilities, order = torch.softmax(scaled, dim=-1).sort(dim=-1, descending=True, stable=True)
    before = probabilities.cumsum(dim=-1) - probabilities
    is_kept = before < top_p
    is_kept[:, 0] = True
    return torch.zeros_like(is_kept).scatter(-1, order, is_kept)


def _log_probs(logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    picked = logits.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
    return picked - logits.logsumexp(dim=-1)
