"""Core attention: causal, grouped-query, documents, windows and sinks, without a seq x seq tensor.

On `scaled_dot_product_attention`; windows, sinks, and what ranks share by tiles (`trainer.model.attention.methods`).
The exceptions, both torch's own: attention dropout on CPU, and a mask where queries and keys differ in number.
Used where Transformer Engine is not installed, on CPU and GPU alike; `FlashCoreAttention` where torch's flash kernels
run, which take grouped heads as they are and all documents at once. Knows nothing of batches or layouts.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention

from trainer.model.attention.cache import CachedTokens, attend_cached
from trainer.model.attention.documents import PackedDocuments
from trainer.model.attention.heads import repeat_heads, widen
from trainer.model.attention.methods import METHODS, Attended, Sharing, Split, attend_alone
from trainer.model.attention.sinks import build_sinks, shard_sinks
from trainer.model.attention.tile_kernels import CpuTiles, EfficientTiles, FlashTiles, TileKernels


class SdpaCoreAttention(MegatronModule):
    """softmax(Q K^T * scale) V with Megatron-Core's core-attention interface (Vaswani et al. 2017, eq. 1).

    With `config.window_size` a query of a layer that has the window sees so many keys to its left and its own. With
    `config.softmax_type` "learnable", `softmax_offset [heads/tp]` is a logit per head whose value is zero.
    """

    tiles: TileKernels = CpuTiles()
    """What attends where ranks share a sequence, or queries do not see all keys before them, and these alone."""
    takes_groups = False
    """Whether the kernels take fewer heads of keys and values than of queries; else these are repeated."""
    widest_head: float = math.inf
    """That the kernels take; layers with wider ones are built with memory-efficient attention instead."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        pg_collection: Any = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        self._method, self._sharing = None, None
        self._layer_number = layer_number
        assert config.kv_channels is not None
        if max(k_channels or config.kv_channels, v_channels or config.kv_channels) > self.widest_head:
            self.tiles, self.takes_groups = EfficientTiles(), False
        if config.context_parallel_size > 1:
            exchange = config.cp_comm_type
            assert isinstance(exchange, str)
            neighbours = pg_collection.hcp if exchange == "a2a+p2p" else (None, None)
            self._method, self._sharing = METHODS[exchange], Sharing(self.tiles, pg_collection.cp, *neighbours)
        self._window: int | None = None
        if is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
            assert config.window_size is not None
            self._window = config.window_size[0] + 1
        self._tp_group = None if pg_collection is None else pg_collection.tp
        self.softmax_offset = build_sinks(config) if config.softmax_type == "learnable" else None
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedDocuments | None = None,
    ) -> torch.Tensor:
        """Attend within each row, or within each document when `packed_seq_params` gives their boundaries.

        query `[sq, batch, heads/tp, dim]`, key, value `[sk, batch, groups/tp, dim]` -> `[sq, batch, heads/tp * dim_v]`.
        Packed: the same without the batch dimension -> `[total, heads/tp * dim_v]`; `CachedTokens` are kept, and seen,
        in the cache of generation, where ranks that share sequences in training have rows of their own. Explicit masks
        and biases raise NotImplementedError: they would need a seq x seq tensor.
        """
        if attention_mask is not None or attention_bias is not None:
            raise NotImplementedError("SdpaCoreAttention takes document boundaries, not attention masks or biases")
        causal = (attn_mask_type or self.attn_mask_type) != AttnMaskType.no_mask
        is_cached = isinstance(packed_seq_params, CachedTokens)
        if isinstance(packed_seq_params, CachedTokens):
            packed_seq_params.cache.write(self._layer_number, key, value, packed_seq_params.places)
            if packed_seq_params.slots is not None:
                scale = self.softmax_scale or query.shape[-1] ** -0.5
                return attend_cached(
                    query, self._layer_number, packed_seq_params, scale, self._window, self.softmax_offset
                )
        # As a slice of the projection's output it would keep all of that, queries and keys, for the backward pass.
        value = value.contiguous()
        if not is_cached and self._method is not None:
            return self._attend_over_ranks(query, key, value, packed_seq_params)
        if self._hides(query, key, packed_seq_params):
            if not causal and len(query) > 1:
                raise NotImplementedError("SdpaCoreAttention has windows and sinks under a causal mask alone")
            return self._attend_by_tiles(query, key, value, packed_seq_params)
        if packed_seq_params is None:
            # [s, b, h, d] -> [b, h, s, d]
            by_head = [part.permute(1, 2, 0, 3) for part in (query, key, value)]
            out = self._attend(by_head[0], by_head[1], by_head[2], causal)
            return out.permute(2, 0, 1, 3).flatten(2)
        return self._attend_documents(query, key, value, causal, packed_seq_params)

    def _attend_over_ranks(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: PackedDocuments | None
    ) -> torch.Tensor:
        """Attend, always causally, over a sequence of which this rank has its part, in the shapes of `forward`."""
        assert self._method is not None and self._sharing is not None
        size = self._sharing.whole.size()
        if documents is None:
            split = Split(1, len(query) * size, (0, len(query) * size), self._window)
        else:
            split = Split(documents.num_rows, len(query) * size // documents.num_rows, documents.bounds, self._window)
        return _by_rows(self._method(self._attended(query, key, value), split, self._sharing), query)

    def _hides(self, query: torch.Tensor, key: torch.Tensor, documents: PackedDocuments | None) -> bool:
        """Return whether there is a sink, or a window shorter than what there is to see."""
        if self.softmax_offset is not None or self._window is None:
            return self.softmax_offset is not None
        if documents is None or documents.max_seqlen_q is None:
            return self._window < len(key)
        return self._window < documents.max_seqlen_q

    def _attend_by_tiles(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: PackedDocuments | None
    ) -> torch.Tensor:
        """Attend causally with windows and sinks, in the shapes of `forward`; the last query is the last key's."""
        bounds = (0, len(key)) if documents is None else documents.bounds
        split = Split(1, len(key), bounds, self._window)
        return _by_rows(attend_alone(self._attended(query, key, value), split, self.tiles), query)

    def _attended(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Attended:
        """Return parts in the shapes of `forward` as tiles take them."""
        scale = self.softmax_scale or query.shape[-1] ** -0.5
        if query.dim() == 4:  # [s, b, h, d] -> [b, h, s, d]
            query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))
        else:  # [t, h, d] -> [1, h, t, d]
            query, key, value = (part.transpose(0, 1).unsqueeze(0) for part in (query, key, value))
        return Attended(query, key, value, scale, self.softmax_offset)

    def _attend_documents(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, documents: PackedDocuments
    ) -> torch.Tensor:
        """Attend over `[total, heads, dim]` document by document."""
        # [t, h, d] -> [1, h, t, d]
        query, key, value = (part.transpose(0, 1).unsqueeze(0) for part in (query, key, value))
        bounds = documents.bounds
        outputs = [
            self._attend(query[:, :, start:end], key[:, :, start:end], value[:, :, start:end], causal)
            for start, end in zip(bounds[:-1], bounds[1:], strict=True)
            if end > start
        ]
        return torch.cat(outputs, dim=2).squeeze(0).transpose(0, 1).flatten(1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the sinks as Megatron-Core's checkpoints hold them, split over tp by heads."""
        if self.softmax_offset is None:
            return {}
        return shard_sinks(self.softmax_offset, prefix, sharded_offsets, self._tp_group, metadata or {})

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool) -> torch.Tensor:
        """Attend over `[batch, heads, seq, dim]`; the last query sees all keys when causal."""
        dim_v, scale = value.shape[-1], self.softmax_scale or query.shape[-1] ** -0.5
        query, key, value = widen(query, key, value)
        is_grouped = key.shape[1] != query.shape[1]
        if is_grouped and not self.takes_groups:
            key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
        same_length = query.shape[2] == key.shape[2]
        mask = None
        if causal and not same_length and query.shape[2] > 1:
            from torch.nn.attention.bias import causal_lower_right  # a second of imports that training never needs

            mask = causal_lower_right(query.shape[2], key.shape[2])
        dropout = self.dropout if self.training else 0.0
        options: dict[str, Any] = {
            "attn_mask": mask,
            "dropout_p": dropout,
            "is_causal": causal and same_length and query.shape[2] > 1,
            "scale": scale,
            "enable_gqa": is_grouped and self.takes_groups,
        }
        if dropout == 0.0:
            return F.scaled_dot_product_attention(query, key, value, **options)[..., :dim_v]
        if self.config.sequence_parallel:  # the block has already forked the tp-specific generator
            return F.scaled_dot_product_attention(query, key, value, **options)[..., :dim_v]
        with get_cuda_rng_tracker().fork():
            return F.scaled_dot_product_attention(query, key, value, **options)[..., :dim_v]


def _by_rows(output: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Return what tiles have given, `[batch, heads, seq, dim_v]`, in the shape that belongs to `query`."""
    if query.dim() == 4:
        return output.permute(2, 0, 1, 3).flatten(2)
    return output.squeeze(0).transpose(0, 1).flatten(1)


class FlashCoreAttention(SdpaCoreAttention):
    """The same on torch's flash kernels (Dao 2023, arXiv:2307.08691), in formats of 16 bits."""

    tiles = FlashTiles()
    takes_groups = True
    widest_head = 256

    def _attend_documents(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, documents: PackedDocuments
    ) -> torch.Tensor:
        """Attend over `[total, heads, dim]` in one kernel, which reads the boundaries on the device."""
        if not self._fits(query, value, documents):
            return super()._attend_documents(query, key, value, causal, documents)
        window = (-1, 0) if causal else (-1, -1)  # to the left all, to the right none or all
        return self._attend_packed(query, key, value, documents, window)

    def _attend_by_tiles(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: PackedDocuments | None
    ) -> torch.Tensor:
        """The kernel of all documents has windows, and no sinks."""
        is_window_alone = self._window is not None and self.softmax_offset is None
        if not is_window_alone or documents is None or not self._fits(query, value, documents):
            return super()._attend_by_tiles(query, key, value, documents)
        assert self._window is not None
        return self._attend_packed(query, key, value, documents, (self._window - 1, 0))

    def _fits(self, query: torch.Tensor, value: torch.Tensor, documents: PackedDocuments) -> bool:
        """Return whether the kernel of all documents can do these."""
        has_dropout, widest = self.training and self.dropout > 0, max(query.shape[-1], value.shape[-1])
        return not has_dropout and widest <= self.widest_head and documents.max_seqlen_q is not None

    def _attend_packed(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        documents: PackedDocuments,
        window: tuple[int, int],
    ) -> torch.Tensor:
        """Attend to so many keys to the left and to the right of a query's own; -1 is all of the document's."""
        from torch.nn.attention.varlen import varlen_attn  # a second of imports

        dim_v, scale = value.shape[-1], self.softmax_scale or query.shape[-1] ** -0.5
        query, key, value = widen(query, key, value, multiple=8)
        key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
        bounds, longest = documents.cu_seqlens_q, documents.max_seqlen_q
        output = varlen_attn(query, key, value, bounds, bounds, longest, longest, scale=scale, window_size=window)
        assert isinstance(output, torch.Tensor)  # the kernel's statistics were not asked for
        return output[..., :dim_v].flatten(1)


class EfficientCoreAttention(SdpaCoreAttention):
    """The same on GPUs in fp32, or before Ampere."""

    tiles = EfficientTiles()


# By what a platform calls its kernels.
CORE_ATTENTIONS: dict[str, type[SdpaCoreAttention]] = {
    "cpu": SdpaCoreAttention,
    "efficient": EfficientCoreAttention,
    "flash": FlashCoreAttention,
}
