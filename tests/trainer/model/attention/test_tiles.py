"""Tiles against the mask they come from: every query meets every key it sees once, and no other."""

from __future__ import annotations

import random
from typing import Any

import pytest

from parallel.sequence_split import segments_of
from tests.pool import Place

NUM_CASES = 400


def seen_by_flash(tile: Any) -> Any:
    """Return what the kernels see of a tile, `[queries, keys]`.

    Windows are counted from the last query and the last key; -1 is all. Documents see each itself.
    """
    import torch

    from trainer.model.attention.tile_kernels import _window

    num_queries, num_keys = tile.queries[1] - tile.queries[0], tile.keys[1] - tile.keys[0]
    own = torch.arange(num_queries)[:, None] + num_keys - num_queries
    columns, (left, right) = torch.arange(num_keys), _window(tile)
    assert left >= -1 and right >= -1 and num_queries > 0 and num_keys > 0
    seen = torch.ones(num_queries, num_keys, dtype=torch.bool)
    if left >= 0:
        seen &= columns >= own - left
    if right >= 0:
        seen &= columns <= own + right
    if tile.bounds:
        document = torch.searchsorted(torch.tensor(tile.bounds), columns, right=True)
        seen &= document[:, None] == document
    return seen


def seen_by_mask(tile: Any) -> Any:
    """Return what the definition of a tile says that is seen."""
    import torch

    rows = torch.arange(tile.queries[1] - tile.queries[0])[:, None]
    columns = torch.arange(tile.keys[1] - tile.keys[0])
    if tile.lead is None:
        return torch.ones(len(rows), len(columns), dtype=torch.bool)
    seen = columns <= rows + tile.lead
    return seen & (columns > rows + tile.lead - tile.window) if tile.window is not None else seen


def wrong_cases(place: Place, seed: int) -> list[str]:
    """Return the cases in which the tiles, or what the flash kernels would see of them, are not the mask."""
    import torch

    from trainer.model.attention.tile_kernels import _cut_masked, _cut_windowed
    from trainer.model.attention.tiles import plan_tiles

    ways = [(_cut_windowed, seen_by_flash, fewest) for fewest in (None, 2)] + [(_cut_masked, seen_by_mask, None)]
    draw, wrong = random.Random(seed), []
    for _ in range(NUM_CASES):
        cp, rows = draw.choice([1, 2, 4]), draw.choice([1, 2, 3])
        length = 2 * cp * draw.choice([1, 2, 3, 5])
        total = rows * length
        ends = (draw.randrange(total) for _ in range(draw.choice([0, 1, 3, 10])))
        bounds = sorted({*range(0, total + 1, length), *ends})
        window = draw.choice([None, None, 1, 2, 3, 7, 100])
        whole = segments_of(0, 1, num_rows=rows, seq_len=length)
        shares = [segments_of(rank, cp, num_rows=rows, seq_len=length) for rank in range(cp)]
        place_of = torch.arange(total)
        document = torch.searchsorted(torch.tensor(bounds), place_of, right=True)
        mask = (document[:, None] == document) & (place_of <= place_of[:, None])
        if window is not None:
            mask &= place_of > place_of[:, None] - window
        for queries in shares:
            for keys in (*shares, whole):
                mine, theirs = (torch.cat([place_of[one.start : one.end] for one in part]) for part in (queries, keys))
                for cut, seen_of, fewest in ways:
                    met = torch.zeros(len(mine), len(theirs), dtype=torch.int)
                    for tile in plan_tiles(queries, keys, bounds, window, fewest):
                        for part in cut(tile):
                            seen = seen_of(part)
                            assert seen.any(1).all(), "a query that sees nothing has no softmax"
                            met[slice(*part.queries), slice(*part.keys)] += seen.int()
                    if not torch.equal(met, mask[mine][:, theirs].int()):
                        wrong.append(f"cp {cp} rows {rows} length {length} bounds {bounds} window {window}")
    return wrong


@pytest.mark.parametrize("seed", [1, 2])
def test_tiles_are_the_mask(ranks, seed):
    assert ranks.run(wrong_cases, seed) == [[]]


def test_all_ranks_have_the_same_work():
    """Under a causal mask without documents, from the pairs of the tiles."""
    from trainer.model.attention.tiles import plan_tiles

    length, cp = 64, 4
    shares = [segments_of(rank, cp, num_rows=1, seq_len=length) for rank in range(cp)]
    pairs = [
        sum(
            (tile.queries[1] - tile.queries[0]) * (tile.keys[1] - tile.keys[0]) / (2 if tile.is_masked else 1)
            for keys in shares
            for tile in plan_tiles(queries, keys, (0, length))
        )
        for queries in shares
    ]
    assert max(pairs) == min(pairs) == length**2 / 2 / cp
