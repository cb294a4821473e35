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
_BLOCK = 256  # ids of which a draw first knows the probability together


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
        largest, tokens = logits.max(dim=-1)  # of equal ones the first, in a fraction of argmax's time on a CPU
        log_probs = largest - logits.logsumexp(dim=-1)
        return Drawn(tokens, log_probs, log_probs)
    whole = logits if sampling.temperature == 1 else logits / sampling.temperature
    scaled, ids = whole, None
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        ids = scaled.topk(sampling.top_k, dim=-1).indices.sort(dim=-1).values
        scaled = scaled.gather(-1, ids)
    if sampling.top_p < 1:
        scaled = scaled.masked_fill(~_nucleus(scaled, sampling.top_p), -torch.inf)
    chosen, log_probs = _draw(scaled, uniforms)
    tokens = chosen if ids is None else ids.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
    if scaled is whole:
        return Drawn(tokens, log_probs, log_probs)
    full = whole.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - whole.logsumexp(dim=-1)
    return Drawn(tokens, log_probs, full)


def _draw(logits: torch.Tensor, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each row of `logits [rows, n]` where softmax's distribution function exceeds its number, and log p.

    Sums of blocks say in which block that is, so that the function itself, in fp64, is made within that block alone.
    """
    largest = logits.amax(dim=-1, keepdim=True)
    num_rows, size = logits.shape
    weights = logits.new_zeros(num_rows, -(-size // _BLOCK) * _BLOCK)
    torch.sub(logits, largest, out=weights[:, :size])
    weights[:, :size].exp_()
    blocks = weights.unflatten(-1, (-1, _BLOCK))  # [rows, blocks, ids]
    of_blocks = blocks.sum(dim=-1).double()
    up_to = of_blocks.cumsum(dim=-1)
    wanted = uniforms.clamp(max=_LARGEST_UNIFORM).unsqueeze(-1) * up_to[:, -1:]
    block = torch.searchsorted(up_to, wanted, right=True)  # [rows, 1]
    within = blocks.take_along_dim(block.unsqueeze(-1), dim=1).squeeze(1).double().cumsum(dim=-1)
    rest = (wanted - up_to.gather(-1, block) + of_blocks.gather(-1, block)).clamp_(min=0.0)
    rest = torch.minimum(rest, within[:, -1:] * _LARGEST_UNIFORM)  # the block's sum was rounded otherwise
    chosen = block * _BLOCK + torch.searchsorted(within, rest, right=True)
    log_probs = logits.gather(-1, chosen) - largest - up_to[:, -1:].log()
    return chosen.squeeze(-1), log_probs.squeeze(-1)


def _nucleus(scaled: torch.Tensor, top_p: float) -> torch.Tensor:
    """Return which of the logits `[rows, n]` are among the fewest likeliest that have the probability `top_p`."""
    probabilities, order = torch.softmax(scaled, dim=-1).sort(dim=-1, descending=True, stable=True)
    before = probabilities.cumsum(dim=-1) - probabilities
    is_kept = before < top_p
    is_kept[:, 0] = True
    return torch.zeros_like(is_kept).scatter(-1, order, is_kept)
