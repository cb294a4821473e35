"""Our core attention and rotation in chunks that train with Transformer Engine's, for as long as they generate.

Transformer Engine's attention knows no cache of ours. Core attentions of plain layers have no weights, so that one
stands for the other; sinks, which are weights, are ours in training too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from megatron.core.transformer.transformer_config import MLATransformerConfig

from trainer.model.attention.core import SdpaCoreAttention


@contextlib.contextmanager
def own_attention(chunks: Sequence[Any], kind: type[SdpaCoreAttention], rotate: Callable[..., Any]) -> Iterator[None]:
    """Let every layer attend with `kind`, and chunks hand down positions with the forward pre-hook `rotate`.

    Chunks that do both already stay as they are.
    """
    with contextlib.ExitStack() as undo:
        for chunk in chunks:
            layers = [layer.self_attention for layer in chunk.decoder.layers]
            foreign = [one for one in layers if not isinstance(one.core_attention, SdpaCoreAttention)]
            for attention in foreign:
                undo.callback(setattr, attention, "core_attention", attention.core_attention)
                attention.core_attention = _build_like(attention, kind)
            if foreign:
                undo.callback(setattr, chunk.config, "apply_rope_fusion", chunk.config.apply_rope_fusion)
                chunk.config.apply_rope_fusion = False
                undo.callback(chunk.register_forward_pre_hook(rotate, with_kwargs=True).remove)
        yield


def _build_like(attention: Any, kind: type[SdpaCoreAttention]) -> SdpaCoreAttention:
    """Return a core attention for a layer, in the mode of evaluation."""
    config = attention.config
    sizes = {}
    if isinstance(config, MLATransformerConfig):
        sizes = {"k_channels": attention.q_head_dim, "v_channels": config.v_head_dim}
    core = kind(
        config=config,
        layer_number=attention.layer_number,
        attn_mask_type=attention.attn_mask_type,
        attention_type=attention.attention_type,
        softmax_scale=getattr(attention, "softmax_scale", config.softmax_scale),
        pg_collection=attention.pg_collection,
        **sizes,
    )
    return core.eval()
