"""Attention sinks: a learned logit per head without a key. How they begin, lie over tp ranks and are saved.

GPT-OSS (arXiv:2508.10925). What they do to attention is in `trainer.model.attention.partial` and `ring`.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

_NAME = "softmax_offset"  # Megatron-Core's


def build_sinks(config: TransformerConfig) -> torch.nn.Parameter:
    """Return this tp rank's heads' sinks `[heads/tp]`, zeros, marked as split over tp."""
    num_heads = config.num_attention_heads // config.tensor_model_parallel_size
    sinks = torch.nn.Parameter(torch.zeros(num_heads, dtype=config.params_dtype))
    set_tensor_model_parallel_attributes(sinks, is_parallel=True, dim=0, stride=1)
    return sinks


def draw_sinks(chunk: torch.nn.Module, config: TransformerConfig) -> None:
    """Draw the sinks of a model chunk on its device, as Megatron-Core does but with each tp rank its own."""
    with get_cuda_rng_tracker().fork():
        for name, parameter in chunk.named_parameters():
            if name.endswith(f".{_NAME}"):
                config.init_method(parameter)


def shard_sinks(
    sinks: torch.nn.Parameter, prefix: str, offsets: Any, tp_group: Any, metadata: dict[str, Any]
) -> dict[str, Any]:
    """Return the entry of a sharded checkpoint, split over tp by heads."""
    groups = {"tp_group": tp_group, "dp_cp_group": metadata["dp_cp_group"]}
    sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint({_NAME: sinks}, prefix, {_NAME: 0}, offsets, **groups)
    return sharded
