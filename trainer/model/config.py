"""Our config -> Megatron-Core's `TransformerConfig`; the one place that knows its field names."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from megatron.core.activations import squared_relu
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from configs.context_parallel import resolve_cp_attention, uses_te_attention
from configs.plan.derive import layer_windows
from configs.sections.model import ModelConfig, MoeConfig
from configs.sections.train import RecomputeConfig
from configs.stages import Config
from parallel.mesh import Mesh
from parallel.precision import model_precision
from trainer.model.rope import yarn_coefficient

ACTIVATIONS = {
    "swiglu": (True, F.silu),
    "geglu": (True, F.gelu),
    "gelu": (False, F.gelu),
    "squared_relu": (False, squared_relu),
}
# Megatron-Core's names of what `parallel.cp_attention` means; it hands them to the core attention.
CP_EXCHANGES = {
    "te": "p2p", "ring": "p2p", "all_gather": "all_gather", "ulysses": "a2a", "hierarchical": "a2a+p2p",
}  # fmt: skip
BALANCING = {"aux_loss": "aux_loss", "bias": "none", "none": "none"}


def build_transformer_config(config: Config, mesh: Mesh, *, use_te: bool) -> TransformerConfig:
    """Return the `TransformerConfig` of this run's model and layout; Megatron-Core validates it once more."""
    model = config.model
    cp_attention = resolve_cp_attention(config, has_te=use_te)
    fields = _architecture(model) | _windows(model) | _layout(config, cp_attention)
    fields |= model_precision(config, use_te=use_te)
    fields |= _recompute(config.train.recompute)
    if model.moe is not None:
        fields |= _moe(model, model.moe, config, use_te=use_te)
    fuses, compute = mesh.platform.fuses_kernels, config.precision.compute
    fields |= {
        # Megatron-Core's fused gelu and geglu are the tanh approximation, which is another function.
        "bias_activation_fusion": (fuses or not use_te) and model.activation == "swiglu",  # trainer.engine.kernels
        # Without either it is one addition; a compiled one took an H200's host 0.24 ms to start.
        "bias_dropout_fusion": fuses and (model.hidden_dropout > 0 or model.linear_bias),
        # Transformer Engine's knows no attention factor, and one table of angles for all documents.
        "apply_rope_fusion": fuses
        and model.mla is None
        and model.rope.scaling not in ("dynamic", "yarn")
        and uses_te_attention(config, use_te=use_te),
        "gradient_accumulation_fusion": fuses or compute == "fp32",  # trainer.model.weight_gradients
        # Megatron-Core's fused loss rounds its gradient to bf16, whatever the format of the logits.
        "cross_entropy_loss_fusion": fuses and compute == "bf16",
        "masked_softmax_fusion": False,
        "calculate_per_token_loss": True,
        "variable_seq_lengths": False,
    }
    if model.mla is None:
        return _with_yarn(TransformerConfig(**fields), model)
    return MLATransformerConfig(**fields, **_mla(model))


def _architecture(model: ModelConfig) -> dict[str, Any]:
    gated, activation = ACTIVATIONS[model.activation]
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups or model.num_attention_heads,
        "kv_channels": model.head_dim or model.hidden_size // model.num_attention_heads,
        "normalization": "RMSNorm" if model.norm == "rmsnorm" else "LayerNorm",
        "layernorm_epsilon": model.norm_eps,
        "gated_linear_unit": gated,
        "activation_func": activation,
        "add_bias_linear": model.linear_bias,
        "add_qkv_bias": model.qkv_bias,
        "qk_layernorm": model.qk_norm or (model.mla is not None and model.mla.q_lora_rank is not None),
        "rotary_interleaved": model.rope.interleaved and model.mla is None,
        "init_method_std": model.init_std,
        "hidden_dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
    }


def _windows(model: ModelConfig) -> dict[str, Any]:
    """Megatron-Core counts the keys to the left and to the right of a query, beside the query's own."""
    fields: dict[str, Any] = {"softmax_type": "learnable"} if model.attention_sinks else {}
    if model.window_size is not None:
        fields["window_size"] = (model.window_size - 1, 0)
        fields["window_attn_skip_freq"] = [int(window is not None) for window in layer_windows(model)]
    return fields


def _layout(config: Config, cp_attention: str) -> dict[str, Any]:
    sizes = config.parallel
    return {
        "tensor_model_parallel_size": sizes.tp,
        "pipeline_model_parallel_size": sizes.pp,
        "virtual_pipeline_model_parallel_size": sizes.vpp if sizes.vpp > 1 else None,
        "context_parallel_size": sizes.cp,
        "cp_comm_type": CP_EXCHANGES[cp_attention] if sizes.cp > 1 else None,
        "expert_model_parallel_size": sizes.ep,
        "expert_tensor_parallel_size": sizes.etp or sizes.tp,
        "sequence_parallel": sizes.sp,
        "num_layers_in_first_pipeline_stage": sizes.num_layers_in_first_pp_stage,
        "num_layers_in_last_pipeline_stage": sizes.num_layers_in_last_pp_stage,
        "account_for_embedding_in_pipeline_split": sizes.vocabulary_counts_as_layers,
        "account_for_loss_in_pipeline_split": sizes.vocabulary_counts_as_layers,
        "deallocate_pipeline_outputs": True,
        # Batched sends mix up activations and gradients when pp = 2, where next and previous stage are one rank.
        "overlap_p2p_comm": sizes.vpp > 1,
        "batch_p2p_comm": sizes.vpp == 1,
    }


def _recompute(recompute: RecomputeConfig) -> dict[str, Any]:
    if recompute.granularity == "none":
        return {}
    if recompute.granularity == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(recompute.modules)}
    return {
        "recompute_granularity": "full",
        "recompute_method": recompute.method,
        "recompute_num_layers": recompute.num_layers,
    }


def _moe(model: ModelConfig, moe: MoeConfig, config: Config, *, use_te: bool) -> dict[str, Any]:
    return {
        "num_moe_experts": moe.num_experts,
        "moe_router_topk": moe.top_k,
        "moe_ffn_hidden_size": moe.ffn_hidden_size,
        "moe_layer_freq": [int(layer >= moe.num_dense_layers) for layer in range(model.num_layers)],
        "moe_shared_expert_intermediate_size": moe.shared_expert_ffn_hidden_size,
        "moe_router_score_function": moe.score_function,
        "moe_router_pre_softmax": moe.softmax_before_topk,
        "moe_router_load_balancing_type": BALANCING[moe.balancing],
        "moe_aux_loss_coeff": moe.aux_loss_coeff if moe.balancing == "aux_loss" else 0.0,
        "moe_z_loss_coeff": moe.z_loss_coeff or None,
        "moe_router_enable_expert_bias": moe.balancing == "bias",
        "moe_router_bias_update_rate": moe.bias_update_rate,
        "moe_router_num_groups": moe.num_groups,
        "moe_router_group_topk": moe.group_top_k,
        "moe_router_topk_scaling_factor": moe.scaling_factor,
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": use_te,
    }


def _mla(model: ModelConfig) -> dict[str, Any]:
    mla, rope = model.mla, model.rope
    assert mla is not None
    yarn = rope.scaling == "yarn"
    return {
        "multi_latent_attention": True,
        "q_lora_rank": mla.q_lora_rank,
        "kv_lora_rank": mla.kv_lora_rank,
        "qk_head_dim": mla.qk_nope_head_dim,
        "qk_pos_emb_head_dim": mla.qk_rope_head_dim,
        "v_head_dim": mla.v_head_dim,
        "rope_type": "yarn" if yarn else "rope",
        "rotary_base": rope.base,
        "rotary_percent": 1.0,
        "rotary_scaling_factor": rope.factor if yarn else 1.0,
        "original_max_position_embeddings": rope.original_max_position_embeddings,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        "mscale": yarn_coefficient(rope),
        "mscale_all_dim": rope.mscale_all_dim,
    }


def _with_yarn(transformer: TransformerConfig, model: ModelConfig) -> TransformerConfig:
    """Set the yarn attributes that Megatron-Core reads from the config without declaring them as fields."""
    rope = model.rope
    if rope.scaling == "yarn":
        transformer.yarn_rotary_scaling_factor = rope.factor
        transformer.yarn_original_max_position_embeddings = rope.original_max_position_embeddings
        transformer.yarn_beta_fast = rope.beta_fast
        transformer.yarn_beta_slow = rope.beta_slow
        transformer.yarn_mscale = yarn_coefficient(rope)
        transformer.yarn_mscale_all_dim = rope.mscale_all_dim
        transformer.yarn_correction_range_round_to_int = True  # trainer.model.build sets it, for latent attention too
    return transformer
