"""The ways in which context-parallel ranks share attention: which exchange, and which tiles are left to each.

    ring           keys go round (arXiv:2310.01889); any number of ranks and heads
    all_gather     every rank gets all keys (Llama 3, arXiv:2407.21783 section 3.3.2)
    ulysses        all-to-all between tokens and heads (arXiv:2309.14509); heads must divide
    hierarchical   ulysses among `cp_inner` neighbours, a ring across them

All are exact. Queries `[batch, heads, seq/cp, dim]`, keys and values `[batch, groups, seq/cp, dim]`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from parallel.sequence_split import Segment, segments_of
from trainer.model.attention.exchange import GatherTokens, HeadsForTokens, TokensForHeads
from trainer.model.attention.ring import RingAttention
from trainer.model.attention.tiles import Tile, plan_tiles


@dataclass(frozen=True)
class Split:
    """A sequence over the ranks of a context-parallel group, and the documents in it."""

    num_rows: int
    """Rows laid end to end in dimension 2."""
    seq_len: int
    """Tokens of a row on all ranks together."""
    bounds: tuple[int, ...]
    """Where documents begin among the num_rows * seq_len tokens, and the end."""
    window: int | None = None
    """Keys that a query sees, itself among them; None for all before it."""


@dataclass(frozen=True)
class Groups:
    """The ranks that share a sequence; for `hierarchical`, neighbours and every neighbourhood's rank of this place."""

    whole: Any
    inner: Any = None
    outer: Any = None


Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, "torch.Tensor | None", Split, Groups, float], torch.Tensor]


def attend_ring(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sink: torch.Tensor | None,
    split: Split,
    groups: Groups,
    scale: float,
) -> torch.Tensor:
    """Attend while keys and values go round. Collective: all ranks of the group must call this."""
    plan = _plan_ring(split, groups.whole.rank(), groups.whole.size(), 1)
    return RingAttention.apply(query, key, value, sink, plan, groups.whole, scale)


def attend_gathered(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sink: torch.Tensor | None,
    split: Split,
    groups: Groups,
    scale: float,
) -> torch.Tensor:
    """Attend over the keys and values of all ranks. Collective: all ranks of the group must call this."""
    rank, size = groups.whole.rank(), groups.whole.size()
    plan = (_plan(split, (rank,), tuple(range(size)), size),)
    key, value = (GatherTokens.apply(part, groups.whole) for part in (key, value))
    return RingAttention.apply(query, key, value, sink, plan, None, scale)


def attend_heads(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sink: torch.Tensor | None,
    split: Split,
    groups: Groups,
    scale: float,
) -> torch.Tensor:
    """Attend with some of the heads over all tokens. Collective: all ranks of the group must call this."""
    return attend_hierarchical(query, key, value, sink, split, Groups(groups.whole, groups.whole, None), scale)


def attend_hierarchical(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sink: torch.Tensor | None,
    split: Split,
    groups: Groups,
    scale: float,
) -> torch.Tensor:
    """Attend with some of the heads over the neighbours' tokens, while the keys of such heads go round the others.

    Fewer groups of keys than neighbours are repeated. Collective: all ranks of the group must call this.
    """
    inner, size = groups.inner.size(), groups.whole.size()
    if key.shape[1] < inner:
        key, value = (part.repeat_interleave(inner // key.shape[1], dim=1) for part in (key, value))
    query, key, value = (HeadsForTokens.apply(part, groups.inner) for part in (query, key, value))
    if sink is not None:
        sink = sink.chunk(inner)[groups.inner.rank()]
    rank = 0 if groups.outer is None else groups.outer.rank()
    plan = _plan_ring(split, rank, size // inner, inner)
    output = RingAttention.apply(query, key, value, sink, plan, groups.outer, scale)
    return TokensForHeads.apply(output, groups.inner)


# By Megatron-Core's names of the exchanges, `cp_comm_type`.
METHODS: dict[str, Attend] = {
    "p2p": attend_ring,
    "all_gather": attend_gathered,
    "a2a": attend_heads,
    "a2a+p2p": attend_hierarchical,
}


@functools.lru_cache(maxsize=64)
def _plan_ring(split: Split, place: int, num_places: int, ranks_a_place: int) -> tuple[tuple[Tile, ...], ...]:
    """Return the tiles of each step of a ring whose places are so many neighbouring ranks each."""

    def ranks_of(number: int) -> tuple[int, ...]:
        first = number % num_places * ranks_a_place
        return tuple(range(first, first + ranks_a_place))

    size = num_places * ranks_a_place
    return tuple(_plan(split, ranks_of(place), ranks_of(place - step), size) for step in range(num_places))


@functools.lru_cache(maxsize=256)
def _plan(split: Split, queries: tuple[int, ...], keys: tuple[int, ...], size: int) -> tuple[Tile, ...]:
    """Return the tiles of the queries of some ranks with the keys of some."""
    return tuple(plan_tiles(_held_by(split, queries, size), _held_by(split, keys, size), split.bounds, split.window))


def _held_by(split: Split, ranks: Sequence[int], size: int) -> list[Segment]:
    """Return where the tokens of several ranks lie, one rank's after the other's."""
    each = split.num_rows * split.seq_len // size
    return [
        Segment(segment.local + place * each, segment.start, segment.length)
        for place, rank in enumerate(ranks)
        for segment in segments_of(rank, size, num_rows=split.num_rows, seq_len=split.seq_len)
    ]
