"""Rows -> the passes of the model over them: whole prompts, or one new token of each row."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

from parallel.mesh import Mesh
from trainer.data.batch import copy_to
from trainer.generate.rows import Row
from trainer.model.attention.cache import CachedTokens, KeyValueCache


def num_microbatches(num_pieces: int, mesh: Mesh) -> int:
    """Return how many microbatches a pass over prompts or rows has: one for each pipeline stage, if there are so many.

    The interleaved schedule wants no fewer.
    """
    return mesh.pp_size if mesh.vpp_size > 1 else max(1, min(mesh.pp_size, num_pieces))


def prompt_pass(
    prompts: Sequence[tuple[int, Row]], cache: KeyValueCache, mesh: Mesh, *, num_parts: int, multiple: int
) -> list[CachedTokens]:
    """Return the microbatches of a pass over the whole prompts of rows, given with their slots; the last tokens' logits
    are wanted. The tokens of a microbatch are a multiple of `multiple`."""
    lengths = [len(row.prompt_ids) for _, row in prompts]
    parts = _cut_evenly(lengths, num_parts)
    size = _round_up(max(sum(lengths[part.start : part.stop]) for part in parts), multiple)
    return [_prompts(prompts[part.start : part.stop], cache, mesh, size) for part in parts]


def token_pass(
    rows: Sequence[Row], cache: KeyValueCache, mesh: Mesh, *, num_parts: int, multiple: int
) -> list[CachedTokens]:
    """Return the microbatches of a pass over the newest token of each row; row i has slot i."""
    parts = _cut_evenly([1] * len(rows), num_parts)
    size = _round_up(max(len(part) for part in parts), multiple)
    return [_new_tokens(rows, part, cache, mesh, size) for part in parts]


def _cut_evenly(weights: Sequence[int], num_parts: int) -> list[range]:
    """Return neighbouring ranges of about equal weight, some perhaps empty."""
    ends = list(itertools.accumulate(weights))
    total, cuts = sum(weights), [0]
    for part in range(1, num_parts):
        share = total * part / num_parts
        cuts.append(max(cuts[-1], sum(end <= share for end in ends)))
    return [range(start, end) for start, end in zip(cuts, [*cuts[1:], len(weights)], strict=True)]


def _round_up(num_tokens: int, multiple: int) -> int:
    """Return the tokens of a microbatch, at least one."""
    return max(1, math.ceil(num_tokens / multiple)) * multiple


def _prompts(prompts: Sequence[tuple[int, Row]], cache: KeyValueCache, mesh: Mesh, size: int) -> CachedTokens:
    columns: list[list[int]] = [[], [], [], []]
    bounds = [0]
    for slot, row in prompts:
        length = len(row.prompt_ids)
        own = range(length)
        first = slot * cache.length
        for column, values in zip(
            columns, (row.prompt_ids, own, range(first, first + length), [length] * length), strict=True
        ):
            column.extend(values)
        bounds.append(len(columns[0]))
    if len(columns[0]) < size:
        _fill_up(columns, size, cache)
        bounds.append(size)
    wanted = torch.tensor([end - 1 for end in bounds[1 : len(prompts) + 1]], dtype=torch.int64)
    return _build(columns, bounds, cache, mesh, wanted=copy_to(wanted, mesh.device))


def _new_tokens(rows: Sequence[Row], slots: range, cache: KeyValueCache, mesh: Mesh, size: int) -> CachedTokens:
    mine = [rows[slot] for slot in slots]
    counts = [row.num_cached for row in mine]
    places = [slot * cache.length + count for slot, count in zip(slots, counts, strict=True)]
    columns = [[row.token_ids[-1] for row in mine], list(counts), places, [count + 1 for count in counts]]
    lengths = list(columns[3])
    _fill_up(columns, size, cache)
    tokens = _build(columns, range(size + 1), cache, mesh)
    tokens.slots = slots
    tokens.shortest, tokens.longest = min(lengths, default=0), max(lengths, default=0)
    return tokens


def _fill_up(columns: list[list[int]], size: int, cache: KeyValueCache) -> None:
    """Add tokens that are nobody's."""
    missing = size - len(columns[0])
    for column, values in zip(
        columns, ([0] * missing, [0] * missing, [cache.spare_place] * missing, [1] * missing), strict=True
    ):
        column.extend(values)


def _build(
    columns: list[list[int]],
    bounds: Sequence[int],
    cache: KeyValueCache,
    mesh: Mesh,
    wanted: torch.Tensor | None = None,
) -> CachedTokens:
    """Return the tokens of `columns`: ids, positions, places in the cache, lengths of their rows."""
    ids, positions, places, lengths = copy_to(torch.tensor(columns, dtype=torch.int64), mesh.device)
    ends = copy_to(torch.tensor(bounds, dtype=torch.int32), mesh.device)
    longest = max(end - start for start, end in itertools.pairwise(bounds))
    return CachedTokens(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=longest,
        max_seqlen_kv=cache.length,
        bounds=tuple(bounds),
        cache=cache,
        ids=ids,
        positions=positions,
        places=places,
        lengths=lengths,
        wanted=wanted,
    )
