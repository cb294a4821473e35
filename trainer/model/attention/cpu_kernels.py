"""One tile of attention and its gradient on torch's flash kernels for CPUs, which give the log-sum-exp too."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from trainer.model.attention.tiles import Tile

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_ROWS_A_MASK = 512


def attend_tile(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tile: Tile, scale: float
) -> Iterator[tuple[tuple[int, int], torch.Tensor, torch.Tensor]]:
    """Yield queries (from, to), output `[batch, heads, n, dim_v]` and log-sum-exp `[batch, heads, n]` of a tile.

    query `[batch, heads, seq, dim]`, key `[batch, groups, seq_k, dim]`, value `[batch, groups, seq_k, dim_v]`.
    """
    width, dim_v, groups = max(query.shape[-1], value.shape[-1]), value.shape[-1], query.shape[1] // key.shape[1]
    for block in _blocks(tile):
        query_, key_, value_ = _parts(query, key, value, block, width, groups)
        mask = _mask(block, query)
        output, log_sum = _FORWARD(query_, key_, value_, 0.0, _is_plain(block), attn_mask=mask, scale=scale)
        yield block.queries, output[..., :dim_v], log_sum


def attend_tile_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    log_sum: torch.Tensor,
    tile: Tile,
    scale: float,
    sums: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Add a tile's part of the gradients to `sums`, fp32 in the shapes of query, key and value.

    `output` and `log_sum` are those over all keys, so that the parts of all tiles add up to the whole.
    """
    width, groups = max(query.shape[-1], value.shape[-1]), query.shape[1] // key.shape[1]
    for block in _blocks(tile):
        rows, columns = slice(*block.queries), slice(*block.keys)
        query_, key_, value_ = _parts(query, key, value, block, width, groups)
        out, given = (_widen(part[:, :, rows], width) for part in (output, gradient))
        parts = _BACKWARD(
            given,
            query_,
            key_,
            value_,
            out,
            log_sum[:, :, rows],
            0.0,
            _is_plain(block),
            attn_mask=_mask(block, query),
            scale=scale,
        )
        sums[0][:, :, rows] += parts[0][..., : query.shape[-1]]
        for total, part in zip(sums[1:], parts[1:], strict=True):
            part = part[..., : total.shape[-1]]
            total[:, :, columns] += part if groups == 1 else part.unflatten(1, (-1, groups)).float().sum(2)


def _blocks(tile: Tile) -> Iterator[Tile]:
    """Cut a tile whose mask the kernels do not know into rows, so that no mask is larger than rows x keys seen."""
    if not tile.is_masked or _is_plain(tile):
        yield tile
        return
    assert tile.lead is not None
    (first, last), (first_key, last_key) = tile.queries, tile.keys
    for start in range(first, last, _ROWS_A_MASK):
        end = min(start + _ROWS_A_MASK, last)
        lead = tile.lead + start - first  # of the block's first query over the tile's first key
        oldest = 0 if tile.window is None else max(0, lead - tile.window + 1)
        newest = min(last_key - first_key, lead + end - start)
        if oldest < newest:
            yield Tile((start, end), (first_key + oldest, first_key + newest), lead - oldest, tile.window)


def _is_plain(tile: Tile) -> bool:
    """Return whether the kernels' own causal mask is this tile's."""
    num_queries, num_keys = (place[1] - place[0] for place in (tile.queries, tile.keys))
    return tile.lead == 0 and tile.window is None and num_queries == num_keys


def _mask(tile: Tile, like: torch.Tensor) -> torch.Tensor | None:
    if not tile.is_masked or _is_plain(tile):
        return None
    rows = torch.arange(tile.queries[1] - tile.queries[0])[:, None] + tile.lead
    columns = torch.arange(tile.keys[1] - tile.keys[0])
    seen = columns <= rows
    if tile.window is not None:
        seen &= columns > rows - tile.window
    return torch.zeros(seen.shape, dtype=like.dtype).masked_fill_(~seen, float("-inf"))


def _parts(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tile: Tile, width: int, groups: int
) -> tuple[torch.Tensor, ...]:
    rows, columns = slice(*tile.queries), slice(*tile.keys)
    pair = (_widen(part[:, :, columns], width) for part in (key, value))
    return _widen(query[:, :, rows], width), *(
        part.repeat_interleave(groups, 1) if groups > 1 else part for part in pair
    )


def _widen(part: torch.Tensor, width: int) -> torch.Tensor:
    """Return queries, keys or values of the size that all three must have: zero columns change nothing (MLA)."""
    return part if part.shape[-1] == width else F.pad(part, (0, width - part.shape[-1]))
