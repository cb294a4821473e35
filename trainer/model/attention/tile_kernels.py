"""One tile of attention and its gradient, on the kernels of torch that give the log-sum-exp of each query as well.

That is what lets results over some of the keys be added up (`partial`), and the gradients too: given the output and
log-sum-exp over all keys, a kernel's gradient over some of them is their part of the whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from trainer.model.attention.heads import repeat_heads, widen
from trainer.model.attention.tiles import Tile

_ROWS_A_MASK = 512
Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Query, key and value, or what belongs to them; the sums of their gradients, to which tiles add, are fp32."""


class CpuTiles:
    """Flash attention for CPUs: one size for queries, keys and values, as many heads of each, masks as tensors."""

    multiple = 1
    """Of which the kernels want sizes of heads; columns of zeros are added, which change nothing."""
    fewest_packed: int | None = None
    """Documents that are to be one tile; None where the kernels take none of more than one."""

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tile: Tile, scale: float
    ) -> Iterator[tuple[tuple[int, int], torch.Tensor, torch.Tensor]]:
        """Yield queries (from, to), output `[batch, heads, n, dim_v]` and log-sum-exp `[batch, heads, n]`.

        query `[batch, heads, seq, dim]`, key `[batch, groups, seq_k, dim]`, value `[batch, groups, seq_k, dim_v]`.
        """
        for block in _cut_masked(tile):
            parts = _alike(query, key, value, block, self.multiple)
            output, log_sum = self._forward(*parts, _is_plain(block), _mask(block, query), scale)
            yield block.queries, output[..., : value.shape[-1]], log_sum

    def add_gradients(
        self, gradient: torch.Tensor, inputs: Three, output: torch.Tensor, log_sum: torch.Tensor, tile: Tile,
        scale: float, sums: Three,
    ) -> None:  # fmt: skip
        """Add a tile's part of the gradients of `inputs` (query, key, value) to `sums`, in their shapes.

        `gradient`, `output` and `log_sum` are those of all queries over all keys.
        """
        query, key, value = inputs
        groups = query.shape[1] // key.shape[1]
        for block in _cut_masked(tile):
            rows, columns = slice(*block.queries), slice(*block.keys)
            parts = _alike(query, key, value, block, self.multiple)
            given, out, _ = widen(gradient[:, :, rows], output[:, :, rows], parts[0])
            found = self._backward(
                given, *parts, out, log_sum[:, :, rows], _is_plain(block), _mask(block, query), scale
            )
            sums[0][:, :, rows] += found[0][..., : query.shape[-1]]
            for total, part in zip(sums[1:], found[1:], strict=True):
                part = part[..., : total.shape[-1]]
                total[:, :, columns] += part if groups == 1 else part.unflatten(1, (-1, groups)).float().sum(2)

    def _forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool, mask: Any, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return attend(query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale)

    def _backward(
        self, gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        output: torch.Tensor, log_sum: torch.Tensor, is_causal: bool, mask: Any, scale: float,
    ) -> Three:  # fmt: skip
        differentiate = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return differentiate(gradient, query, key, value, output, log_sum, 0.0, is_causal, attn_mask=mask, scale=scale)


class EfficientTiles(CpuTiles):
    """Memory-efficient attention for GPUs (Rabe and Staats 2021, arXiv:2112.05682): fp32 too, and heads of any size."""

    multiple = 8

    def _forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool, mask: Any, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        attend = torch.ops.aten._scaled_dot_product_efficient_attention
        mask = _align(mask, query)
        output, log_sum, _, _ = attend(query, key, value, mask, True, 0.0, is_causal, scale=scale)
        return output, log_sum[:, :, : query.shape[2]]

    def _backward(
        self, gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        output: torch.Tensor, log_sum: torch.Tensor, is_causal: bool, mask: Any, scale: float,
    ) -> Three:  # fmt: skip
        differentiate = torch.ops.aten._scaled_dot_product_efficient_attention_backward
        # The kernel wants a multiple of 32 rows, and counts those that are none with no weight.
        log_sum = F.pad(log_sum, (0, -log_sum.shape[2] % 32), value=float("inf"))
        none = torch.zeros((), dtype=torch.int64)  # the random state of a dropout there is not
        asked = [True, True, True, False]
        mask = _align(mask, query)
        found = differentiate(
            gradient, query, key, value, mask, output, log_sum, none, none, 0.0, asked, is_causal, scale=scale
        )
        return found[0], found[1], found[2]


class FlashTiles:
    """Flash attention for GPUs (Dao 2023, arXiv:2307.08691), in 16 bits, for heads of at most 256.

    Grouped heads and windows as they are, and in one launch documents that follow each other.
    """

    fewest_packed: int | None = 3  # one launch more costs less than sending the boundaries

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tile: Tile, scale: float
    ) -> Iterator[tuple[tuple[int, int], torch.Tensor, torch.Tensor]]:
        """Yield queries (from, to), output and log-sum-exp, in the shapes of `CpuTiles`."""
        for block in _cut_windowed(tile):
            parts = [_turn(part, block) for part in _parts(query, key, value, block, multiple=8)]
            left, right = _window(block)
            output, log_sum, *_ = torch.ops.aten._flash_attention_forward(
                *parts, *_extents(block, query), 0.0, False, False,
                scale=scale, window_size_left=left, window_size_right=right,
            )  # fmt: skip
            if block.bounds:
                output, log_sum = (part.unflatten(dim, (len(query), -1)) for part, dim in ((output, 0), (log_sum, 1)))
                log_sum = log_sum.transpose(0, 1)
            yield block.queries, output.transpose(1, 2)[..., : value.shape[-1]], log_sum

    def add_gradients(
        self, gradient: torch.Tensor, inputs: Three, output: torch.Tensor, log_sum: torch.Tensor, tile: Tile,
        scale: float, sums: Three,
    ) -> None:  # fmt: skip
        """Add a tile's part of the gradients to `sums`, as `CpuTiles` does."""
        for block in _cut_windowed(tile):
            rows, columns = slice(*block.queries), slice(*block.keys)
            parts = _parts(*inputs, block, multiple=8)
            given, out, _ = widen(gradient[:, :, rows], output[:, :, rows], parts[0])
            given, *turned, out = (_turn(part, block).contiguous() for part in (given, *parts, out))
            mine = log_sum[:, :, rows]
            mine = (mine.transpose(0, 1).flatten(1) if block.bounds else mine).contiguous()
            left, right = _window(block)
            none = torch.empty(0, dtype=torch.int64, device=gradient.device)
            found = torch.ops.aten._flash_attention_backward(
                given, *turned, out, mine, *_extents(block, gradient), 0.0, False, none, none,
                scale=scale, window_size_left=left, window_size_right=right,
            )  # fmt: skip
            if block.bounds:
                found = [part.unflatten(0, (len(gradient), -1)) for part in found]
            for total, part, places in zip(sums, found, (rows, columns, columns), strict=True):
                total[:, :, places] += part.transpose(1, 2)[..., : total.shape[-1]]


TileKernels = CpuTiles | FlashTiles


def _cut_masked(tile: Tile) -> Iterator[Tile]:
    """Cut a tile whose mask is not the kernels' own into rows, so that no mask is larger than rows x keys seen."""
    if not tile.is_masked or _is_plain(tile):
        yield tile
        return
    first, last = tile.queries
    for start in range(first, last, _ROWS_A_MASK):
        yield _rows_of(tile, start, min(start + _ROWS_A_MASK, last))


def _cut_windowed(tile: Tile) -> Iterator[Tile]:
    """Cut a tile into rows that see at least as many keys as they are, as the kernels' windows want it.

    These are counted from the last query and the last key, and none may be negative.
    """
    start, last = tile.queries
    if tile.bounds:
        yield tile
        return
    while start < last:
        seen = _rows_of(tile, start, last) if tile.window is not None else tile
        end = last if tile.window is None else min(last, start + seen.keys[1] - seen.keys[0])
        yield _rows_of(tile, start, end) if tile.window is not None else tile
        start = end


def _rows_of(tile: Tile, start: int, end: int) -> Tile:
    """Return a masked tile's queries from start to end, with the keys that some of them see."""
    assert tile.lead is not None
    lead = tile.lead + start - tile.queries[0]  # of the first of these queries over the tile's first key
    oldest = 0 if tile.window is None else max(0, lead - tile.window + 1)
    newest = min(tile.keys[1] - tile.keys[0], lead + end - start)
    return Tile((start, end), (tile.keys[0] + oldest, tile.keys[0] + newest), lead - oldest, tile.window)


def _window(tile: Tile) -> tuple[int, int]:
    """Return how many keys a query sees to either side of its own as the flash kernels count; -1 is all.

    Query i's own key is there i + keys - queries.
    """
    if tile.lead is None:
        return -1, -1
    num_queries, num_keys = (place[1] - place[0] for place in (tile.queries, tile.keys))
    shift = tile.lead - (num_keys - num_queries)
    left = -1 if tile.window is None else tile.window - 1 - shift
    return left, -1 if tile.lead >= num_keys - 1 else shift


def _is_plain(tile: Tile) -> bool:
    """Return whether the kernels' own causal mask is this tile's."""
    num_queries, num_keys = (place[1] - place[0] for place in (tile.queries, tile.keys))
    return tile.lead == 0 and tile.window is None and num_queries == num_keys


def _mask(tile: Tile, like: torch.Tensor) -> torch.Tensor | None:
    """Return 0 where a query sees a key and minus infinity elsewhere, `[queries, keys]`; None if all see all."""
    if tile.lead is None or _is_plain(tile):
        return None
    rows = torch.arange(tile.queries[1] - tile.queries[0], device=like.device)[:, None] + tile.lead
    columns = torch.arange(tile.keys[1] - tile.keys[0], device=like.device)
    seen = columns <= rows
    if tile.window is not None:
        seen &= columns > rows - tile.window
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, float("-inf"))


def _align(mask: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor | None:
    """Return the mask for every head, its rows at the multiples of 8 elements that the kernel wants."""
    if mask is None:
        return None
    num_keys = mask.shape[1]
    wide = F.pad(mask, (0, -num_keys % 8))
    return wide[:, :num_keys].expand(*query.shape[:2], *mask.shape)


def _turn(part: torch.Tensor, tile: Tile) -> torch.Tensor:
    """Return `[batch, heads, n, dim]` as flash kernels take it: `[batch, n, heads, dim]`, or documents end to end."""
    turned = part.transpose(1, 2)
    return turned.flatten(0, 1) if tile.bounds else turned


def _extents(tile: Tile, like: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, int, int]:
    """Return boundaries of documents among queries and keys, on the device, and the longest number of each."""
    if not tile.bounds:
        return None, None, tile.length, tile.keys[1] - tile.keys[0]
    starts = (row * tile.length + start for row in range(len(like)) for start in tile.bounds[:-1])
    bounds = torch.tensor([*starts, len(like) * tile.length], dtype=torch.int32)
    if like.device.type != bounds.device.type:  # without waiting for the device
        bounds = bounds.pin_memory().to(like.device, non_blocking=True)
    longest = max(end - start for start, end in itertools.pairwise(tile.bounds))
    return bounds, bounds, longest, longest


def _parts(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tile: Tile, multiple: int = 1) -> Three:
    """Return the tile's queries, keys and values, of one size."""
    rows, columns = slice(*tile.queries), slice(*tile.keys)
    query, key, value = widen(query[:, :, rows], key[:, :, columns], value[:, :, columns], multiple=multiple)
    return query, key, value


def _alike(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tile: Tile, multiple: int) -> Three:
    """Return the tile's queries, keys and values, of one size and number of heads."""
    query, key, value = _parts(query, key, value, tile, multiple)
    return query, repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
