"""The ways in which context-parallel ranks share attention: which exchange and tiles each has. All are exact.

Keys go round (Liu et al. 2023, arXiv:2310.01889), all ranks get all keys (Llama 3, arXiv:2407.21783 section 3.3.2),
tokens are exchanged for heads (Jacobs et al. 2023, arXiv:2309.14509), or that among neighbours and a ring across them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from parallel.sequence_split import Segment, segments_of
from trainer.model.attention.exchange import GatherTokens, HeadsForTokens, TokensForHeads
from trainer.model.attention.ring import RingAttention
from trainer.model.attention.tile_kernels import TileKernels
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
class Sharing:
    """The ranks that share a sequence, and what each computes its part with."""

    kernels: TileKernels
    whole: Any
    """All of them."""
    inner: Any = None
    """hierarchical: this rank's neighbours."""
    outer: Any = None
    """hierarchical: the ranks of this place among their neighbours."""


@dataclass(frozen=True)
class Attended:
    """Queries `[batch, heads, seq/cp, dim]`, keys and values `[batch, groups, seq/cp, dim]`, and how they attend."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    sink: torch.Tensor | None = None
    """A logit for each head that has no key."""


Attend = Callable[[Attended, Split, Sharing], torch.Tensor]


def attend_alone(what: Attended, split: Split, kernels: TileKernels) -> torch.Tensor:
    """Attend on one rank, which has all keys of `split` and as many of its last queries as are given."""
    plan = (_plan_last(split, what.query.shape[2], kernels.fewest_packed),)
    return RingAttention.apply(what.query, what.key, what.value, what.sink, plan, None, kernels, what.scale)


def attend_ring(what: Attended, split: Split, sharing: Sharing) -> torch.Tensor:
    """Attend while keys and values go round. Collective: all ranks that share the sequence must call this."""
    plan = _plan_ring(split, sharing.whole.rank(), sharing.whole.size(), 1, sharing.kernels.fewest_packed)
    return _attend(what, plan, sharing.whole, sharing)


def attend_gathered(what: Attended, split: Split, sharing: Sharing) -> torch.Tensor:
    """Attend over the keys and values of all ranks. Collective: all ranks that share the sequence must call this."""
    rank, size = sharing.whole.rank(), sharing.whole.size()
    plan = (_plan(split, (rank,), tuple(range(size)), size, sharing.kernels.fewest_packed),)
    key, value = (GatherTokens.apply(part, sharing.whole) for part in (what.key, what.value))
    return _attend(replace(what, key=key, value=value), plan, None, sharing)


def attend_heads(what: Attended, split: Split, sharing: Sharing) -> torch.Tensor:
    """Attend with some of the heads over all tokens. Collective: all ranks that share the sequence must call this."""
    return attend_hierarchical(what, split, replace(sharing, inner=sharing.whole, outer=None))


def attend_hierarchical(what: Attended, split: Split, sharing: Sharing) -> torch.Tensor:
    """Attend with some of the heads over the neighbours' tokens, while the keys of such heads go round the others.

    Fewer groups of keys than neighbours are repeated. Collective: all ranks that share the sequence must call this.
    """
    inner, outer = sharing.inner.size(), sharing.outer
    key, value, sink = what.key, what.value, what.sink
    if key.shape[1] < inner:
        key, value = (part.repeat_interleave(inner // key.shape[1], dim=1) for part in (key, value))
    query, key, value = (HeadsForTokens.apply(part, sharing.inner) for part in (what.query, key, value))
    if sink is not None:
        sink = sink.chunk(inner)[sharing.inner.rank()]
    place, num_places = (0, 1) if outer is None else (outer.rank(), outer.size())
    plan = _plan_ring(split, place, num_places, inner, sharing.kernels.fewest_packed)
    output = _attend(Attended(query, key, value, what.scale, sink), plan, outer, sharing)
    return TokensForHeads.apply(output, sharing.inner)


# By Megatron-Core's names of the exchanges, `cp_comm_type`.
METHODS: dict[str, Attend] = {
    "p2p": attend_ring,
    "all_gather": attend_gathered,
    "a2a": attend_heads,
    "a2a+p2p": attend_hierarchical,
}


def _attend(what: Attended, plan: Sequence[Sequence[Tile]], ring: Any, sharing: Sharing) -> torch.Tensor:
    return RingAttention.apply(what.query, what.key, what.value, what.sink, plan, ring, sharing.kernels, what.scale)


@functools.lru_cache(maxsize=64)
def _plan_ring(
    split: Split, place: int, num_places: int, ranks_a_place: int, fewest_packed: int | None
) -> tuple[tuple[Tile, ...], ...]:
    """Return the tiles of each step of a ring whose places are so many neighbouring ranks each."""

    def ranks_of(number: int) -> tuple[int, ...]:
        first = number % num_places * ranks_a_place
        return tuple(range(first, first + ranks_a_place))

    size = num_places * ranks_a_place
    steps = range(num_places)
    return tuple(_plan(split, ranks_of(place), ranks_of(place - step), size, fewest_packed) for step in steps)


@functools.lru_cache(maxsize=64)
def _plan_last(split: Split, num_queries: int, fewest_packed: int | None) -> tuple[Tile, ...]:
    """Return the tiles of the last queries with all keys."""
    total = split.num_rows * split.seq_len
    queries = [Segment(0, total - num_queries, num_queries)]
    return tuple(plan_tiles(queries, [Segment(0, 0, total)], split.bounds, split.window, fewest_packed))


@functools.lru_cache(maxsize=256)
def _plan(
    split: Split, queries: tuple[int, ...], keys: tuple[int, ...], size: int, fewest_packed: int | None
) -> tuple[Tile, ...]:
    """Return the tiles of the queries of some ranks with the keys of some."""
    mine, theirs = _held_by(split, queries, size), _held_by(split, keys, size)
    return tuple(plan_tiles(mine, theirs, split.bounds, split.window, fewest_packed))


def _held_by(split: Split, ranks: Sequence[int], size: int) -> list[Segment]:
    """Return where the tokens of several ranks lie, one rank's after the other's."""
    each = split.num_rows * split.seq_len // size
    return [
        Segment(segment.local + place * each, segment.start, segment.length)
        for place, rank in enumerate(ranks)
        for segment in segments_of(rank, size, num_rows=split.num_rows, seq_len=split.seq_len)
    ]
