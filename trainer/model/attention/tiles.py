"""Which queries meet which keys: causal attention inside documents, cut into rectangles that kernels take. Torch-free.

Between two pieces of a sequence that do not overlap there is at most one document that lies in both, and under a causal
mask all of its later part sees all of its earlier part: a rectangle without a mask. Masks are left inside a piece.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from parallel.sequence_split import Segment


@dataclass(frozen=True)
class Tile:
    """A rectangle of attention, in places among the tokens of the ranks that hold queries and keys: first, after last.

    Query i of the tile sees key j where `i + lead - window < j <= i + lead`; everything, where `lead` is None.
    """

    queries: tuple[int, int]
    keys: tuple[int, int]
    lead: int | None = None
    """Tokens by which the first query follows the first key. 0 is the usual causal mask."""
    window: int | None = None
    """Keys that a query sees, itself among them; None for all before it."""
    bounds: tuple[int, ...] = ()
    """Of documents laid end to end in queries and keys alike, of which each sees itself alone: where they begin, from
    0, and the end. Empty for one."""

    @property
    def length(self) -> int:
        """Number of queries."""
        return self.queries[1] - self.queries[0]

    @property
    def is_masked(self) -> bool:
        """Whether some query does not see some key."""
        return self.lead is not None


def plan_tiles(
    queries: Sequence[Segment],
    keys: Sequence[Segment],
    bounds: Sequence[int],
    window: int | None = None,
    fewest_packed: int | None = None,
) -> list[Tile]:
    """Return the rectangles of causal attention of `queries` over `keys`, which may be other ranks' tokens.

    `bounds` are where documents begin among all tokens, ascending, and the end. With `fewest_packed`, so many or more
    documents that lie end to end are one tile.
    """
    tiles = [
        tile
        for query in queries
        for key in keys
        if key.start < query.end
        for tile in _tiles_between(query, key, bounds, window)
    ]
    tiles = _join(tiles)
    return tiles if fewest_packed is None else _pack_documents(tiles, window, fewest_packed)


def _tiles_between(query: Segment, key: Segment, bounds: Sequence[int], window: int | None) -> Iterator[Tile]:
    first = bisect_right(bounds, max(query.start, 0)) - 1
    for number in range(first, len(bounds) - 1):
        start, end = bounds[number], bounds[number + 1]
        if start >= query.end:
            return
        query_start, query_end = max(start, query.start), min(end, query.end)
        # Keys before all of these queries, then those among them.
        before = max(start, key.start), min(end, key.end, query_start)
        among = max(start, key.start, query_start), min(end, key.end, query_end)
        for (key_start, key_end), is_before in ((before, True), (among, False)):
            first, last = query_start if is_before else max(query_start, key_start), query_end
            if window is not None:  # queries too far behind these keys, and keys too far before the first query
                key_start, last = max(key_start, first - window + 1), min(last, key_end - 1 + window)
            if key_start >= key_end or first >= last:
                continue
            is_windowed = window is not None and last - 1 - key_start >= window
            yield Tile(
                (first - query.start + query.local, last - query.start + query.local),
                (key_start - key.start + key.local, key_end - key.start + key.local),
                first - key_start if is_windowed or not is_before else None,
                window if is_windowed else None,
            )


def _join(tiles: list[Tile]) -> list[Tile]:
    """Make one of neighbours that together are one rectangle: fewer and larger kernels."""
    plain = [(tile.queries, tile.keys) for tile in tiles if not tile.is_masked]
    for _ in range(2):  # neighbours in the queries, then, the sides exchanged, in the keys
        rows: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for side, other in plain:
            row = rows.setdefault(other, [])
            if row and row[-1][1] == side[0]:
                row[-1] = (row[-1][0], side[1])
            else:
                row.append(side)
        plain = [(other, side) for other, row in rows.items() for side in row]
    return [Tile(queries, keys) for queries, keys in plain] + [tile for tile in tiles if tile.is_masked]


def _pack_documents(tiles: list[Tile], window: int | None, fewest: int) -> list[Tile]:
    """Make one tile of so many or more causal squares that follow each other in queries and in keys."""
    packed, run = [tile for tile in tiles if not _is_square(tile)], list[Tile]()
    for tile in [*filter(_is_square, tiles), None]:
        if tile is not None and run and run[-1].queries[1] == tile.queries[0] and run[-1].keys[1] == tile.keys[0]:
            run.append(tile)
            continue
        packed += run if len(run) < fewest else [_pack(run, window)]
        run = [] if tile is None else [tile]
    return packed


def _is_square(tile: Tile) -> bool:
    return tile.lead == 0 and tile.length == tile.keys[1] - tile.keys[0]


def _pack(run: list[Tile], window: int | None) -> Tile:
    """Return squares end to end as one tile; those without the window are not longer than it."""
    queries, keys = (run[0].queries[0], run[-1].queries[1]), (run[0].keys[0], run[-1].keys[1])
    is_windowed = any(tile.window is not None for tile in run)
    bounds = (0, *itertools.accumulate(tile.length for tile in run))
    return Tile(queries, keys, 0, window if is_windowed else None, bounds)
