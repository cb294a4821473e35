"""The key-value cache of generation: where layers keep what they have seen, and attention of new tokens over it.

A row of the batch is a slot of the cache; what a pass does with it is said by `CachedTokens`, which travels to the core
attention as packed documents do. Knows no sampling and no layouts: each rank keeps the keys of its own heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from trainer.model.attention.documents import PackedDocuments

Layer = tuple[torch.Tensor, torch.Tensor]


class KeyValueCache:
    """Keys `[places, groups/tp, dim]` and values of every layer of this rank; slot s has places s*length and on.

    One place more belongs to no slot: tokens that only fill up a pass are kept there. Values of latent attention are
    kept expanded, as many heads as queries have.
    """

    def __init__(self, num_slots: int, length: int) -> None:
        self.num_slots, self.length = num_slots, length
        self._layers: dict[int, Layer] = {}

    @property
    def spare_place(self) -> int:
        """The place of tokens that are nobody's."""
        return self.num_slots * self.length

    @property
    def num_bytes(self) -> int:
        """What keys and values of all layers take."""
        return sum(store.nbytes for stores in self._layers.values() for store in stores)

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor, places: torch.Tensor) -> None:
        """Keep keys `[tokens, groups/tp, dim]` and values of a layer at int64 `places [tokens]`."""
        if layer not in self._layers:
            # Zeros, since what is masked counts nothing only where it is finite.
            empty = [one.new_zeros(self.spare_place + 1, *one.shape[1:]) for one in (key, value)]
            self._layers[layer] = empty[0], empty[1]
        for store, part in zip(self._layers[layer], (key, value), strict=True):
            store.index_copy_(0, places, part)

    def read(self, layer: int, slots: range, start: int, end: int) -> Layer:
        """Return views `[slots, groups/tp, end - start, dim]` of slots' positions from `start` to `end`."""
        keys, values = (
            store[: self.spare_place].unflatten(0, (self.num_slots, self.length))[slots.start : slots.stop, start:end]
            for store in self._layers[layer]
        )
        return keys.transpose(1, 2), values.transpose(1, 2)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot to another, in all layers."""
        for stores in self._layers.values():
            for store in stores:
                first, place = source * self.length, target * self.length
                store[place : place + length] = store[first : first + length]


@dataclass
class CachedTokens(PackedDocuments):
    """The tokens of one pass: whole prompts laid end to end, or one new token of each of neighbouring slots.

    `bounds` are the prompts'. All tensors lie on the device; behind the tokens of slots may be some that fill up.
    """

    cache: KeyValueCache = field(default_factory=lambda: KeyValueCache(0, 0))
    ids: torch.Tensor = field(default_factory=torch.Tensor)  # int64 [tokens]
    positions: torch.Tensor = field(default_factory=torch.Tensor)  # int64 [tokens], in their rows
    places: torch.Tensor = field(default_factory=torch.Tensor)  # int64 [tokens], in the cache
    lengths: torch.Tensor = field(default_factory=torch.Tensor)  # int64 [tokens], of each token's row up to this pass
    wanted: torch.Tensor | None = None  # int64, the tokens whose logits are wanted; None for the first `len(slots)`
    slots: range | None = None
    """Whose next tokens these are; None for prompts, which see themselves alone."""
    shortest: int = 0
    """Tokens, with its new one, of the shortest row among the slots."""
    longest: int = 0
    masks: dict[int | None, torch.Tensor | None] = field(default_factory=dict)
    """By window, made by the first layer that has it."""

    def visible(self, window: int | None, dtype: torch.dtype) -> tuple[int, int, torch.Tensor | None]:
        """Return from where to where the rows see keys, and what is added to scores, `[slots, 1, 1, keys]`, if any."""
        start = 0 if window is None else max(0, self.shortest - window)
        if self.shortest == self.longest:
            return start, self.longest, None
        if window not in self.masks:
            assert self.slots is not None
            own = self.positions[: len(self.slots)].unsqueeze(1)  # [slots, 1]
            keys = torch.arange(start, self.longest, device=own.device)
            hidden = keys > own
            if window is not None:
                hidden |= keys <= own - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=own.device).masked_fill_(hidden, -torch.inf)
            self.masks[window] = mask[:, None, None]
        return start, self.longest, self.masks[window]


def attend_cached(
    query: torch.Tensor, layer: int, tokens: CachedTokens, scale: float, window: int | None, sink: torch.Tensor | None
) -> torch.Tensor:
    """Attend from one token `[tokens, heads/tp, dim]` of each slot over its whole row -> `[tokens, heads * dim_v]`.

    The heads of a group stand where the queries of a sequence would, so that keys need not be repeated. `sink` is a
    logit per head that has no value. Tokens that only fill up get zeros.
    """
    assert tokens.slots is not None
    num_rows = len(tokens.slots)
    if num_rows == 0:
        values = tokens.cache.read(layer, tokens.slots, 0, 0)[1]
        return query.new_zeros(len(query), query.shape[1] * values.shape[-1])
    start, end, mask = tokens.visible(window, query.dtype)
    keys, values = tokens.cache.read(layer, tokens.slots, start, end)
    grouped = query[:num_rows].unflatten(1, (keys.shape[1], -1))  # [rows, groups, heads a group, dim]
    attend: Callable[..., torch.Tensor] = F.scaled_dot_product_attention if sink is None else _attend_with_sink
    options = {} if sink is None else {"sink": sink.view(1, keys.shape[1], -1, 1)}
    output = attend(grouped, keys, values, attn_mask=mask, scale=scale, **options).flatten(1)
    return output if len(output) == len(query) else F.pad(output, (0, 0, 0, len(query) - len(output)))


def _attend_with_sink(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    attn_mask: torch.Tensor | None,
    scale: float,
    sink: torch.Tensor,
) -> torch.Tensor:
    """Return softmax([scores, sink]) without its last column, times the values (GPT-OSS, arXiv:2508.10925)."""
    scores = (query @ keys.transpose(2, 3)).float() * scale
    if attn_mask is not None:
        scores = scores + attn_mask
    logits = torch.cat([scores, sink.float().expand(*scores.shape[:3], 1)], dim=-1)
    return torch.softmax(logits, dim=-1)[..., :-1].to(values.dtype) @ values
