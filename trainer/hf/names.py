"""Hugging Face names of files and of a decoder's tensors; a family overrides those in which it differs. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


@dataclass(frozen=True)
class TensorNames:
    """Hugging Face names; those below `layer` are relative to it, those below `expert` to that."""

    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    output: str = "lm_head.weight"
    score: str = "score.weight"
    """The head of a sequence classifier."""
    layer: str = "model.layers.{layer}."
    input_norm: str = "input_layernorm.weight"
    query: str = "self_attn.q_proj."
    key: str = "self_attn.k_proj."
    value: str = "self_attn.v_proj."
    attention_output: str = "self_attn.o_proj."
    query_norm: str = "self_attn.q_norm.weight"
    key_norm: str = "self_attn.k_norm.weight"
    query_down: str = "self_attn.q_a_proj.weight"
    query_latent_norm: str = "self_attn.q_a_layernorm.weight"
    query_up: str = "self_attn.q_b_proj.weight"
    key_value_down: str = "self_attn.kv_a_proj_with_mqa.weight"
    key_value_latent_norm: str = "self_attn.kv_a_layernorm.weight"
    key_value_up: str = "self_attn.kv_b_proj.weight"
    mlp_norm: str = "post_attention_layernorm.weight"
    mlp: str = "mlp."
    gate: str = "gate_proj."
    up: str = "up_proj."
    down: str = "down_proj."
    router: str = "mlp.gate.weight"
    router_bias: str = "mlp.gate.e_score_correction_bias"
    expert: str = "mlp.experts.{expert}."
    expert_gate: str = "gate_proj."
    expert_up: str = "up_proj."
    expert_down: str = "down_proj."
    shared_expert: str = "mlp.shared_experts."
