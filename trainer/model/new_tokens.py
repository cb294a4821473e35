"""A transformer layer over one new token a row: Megatron-Core's modules, without its way from one to the next.

With so few tokens that way (splits, rotations, wrappers, hooks of features that are off) takes as long as the modules.
Layers that are not of the plain kind, and all other passes, go Megatron-Core's way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp

from trainer.model.attention.cache import CachedTokens
from trainer.model.attention.core import SdpaCoreAttention

Forward = Callable[..., tuple[torch.Tensor, Any]]


def forward_new_tokens(forward: Forward) -> Forward:
    """Return `TransformerLayer.forward` that goes straight from module to module where it is given new tokens.

    hidden_states `[tokens, 1, hidden]` -> the same and no context.
    """

    def compute(layer: Any, *args: Any, **options: Any) -> tuple[torch.Tensor, Any]:
        tokens, angles = options.get("packed_seq_params"), options.get("rotary_pos_emb")
        if not isinstance(tokens, CachedTokens) or tokens.slots is None or angles is None:
            return forward(layer, *args, **options)
        if args or torch.is_grad_enabled() or not _is_plain(layer):
            return forward(layer, *args, **options)
        hidden = options["hidden_states"]
        output, bias = _attend(layer.self_attention, layer.input_layernorm(hidden), angles, tokens)
        hidden = _add(output, bias, hidden)
        output, bias = layer.mlp(layer.pre_mlp_layernorm(hidden))
        return _add(output, bias, hidden), None

    return compute


def _is_plain(layer: Any) -> bool:
    """Return whether the layer is norm, grouped-query attention with our core, norm, MLP or experts, and no more."""
    attention, config = layer.self_attention, layer.config
    return (
        type(attention) is SelfAttention
        and isinstance(attention.core_attention, SdpaCoreAttention)
        and isinstance(layer.cross_attention, IdentityOp)
        and config.num_query_groups >= attention.world_size  # else ranks share a group
        and not (config.attention_output_gate or config.fp32_residual_connection or config.no_rope_freq)
    )


def _attend(
    attention: Any, hidden: torch.Tensor, angles: torch.Tensor, tokens: CachedTokens
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the projected output `[tokens, 1, hidden]` and its bias, if any, which is not added yet."""
    mixed, _ = attention.linear_qkv(hidden)  # by group: its queries, its key, its value
    groups, dim = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
    heads = mixed.view(mixed.shape[0], groups, -1, dim)
    value = heads[:, :, -1]
    if not isinstance(attention.q_layernorm, IdentityOp | None):
        heads = torch.cat([attention.q_layernorm(heads[:, :, :-2]), attention.k_layernorm(heads[:, :, -2:-1])], dim=2)
        heads = torch.cat([heads, value.unsqueeze(2)], dim=2)
    # Queries, keys and, to no purpose, values at once.
    rotated = rope_utils.apply_rotary_pos_emb(
        heads.flatten(1, 2),
        angles,
        config=attention.config,
        cu_seqlens=tokens.cu_seqlens_q_padded,
        mscale=attention._yarn_concentration_factor,
        cp_group=attention.pg_collection.cp,
    ).view(heads.shape)
    query, key = rotated[:, :, :-2].flatten(1, 2), rotated[:, :, -2]
    attended = attention.core_attention(query, key, value, None, packed_seq_params=tokens)
    return attention.linear_proj(attended.unsqueeze(1))


def _add(output: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor) -> torch.Tensor:
    """Return the sum, in the memory of `output`."""
    if bias is not None:
        output += bias
    return output.add_(residual)
