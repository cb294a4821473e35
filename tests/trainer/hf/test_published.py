"""Configs as their makers published them are understood, and are the presets where there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from configs.load import load_config
from trainer.hf.config_json import compare_models, left_aside, read_model, write_model

ROOT = Path(__file__).resolve().parents[3]
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
CODE = {
    "AutoConfig": "configuration_deepseek.DeepseekV3Config", "AutoModel": "modeling_deepseek.DeepseekV3Model",
    "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
}  # fmt: skip
SMOLLM2: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 8192, "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 24, "num_key_value_heads": 32,
    "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None,
    "rope_theta": 130000, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.42.3",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}}, "use_cache": True,
    "vocab_size": 49152,
}  # fmt: skip
QWEN3_CODER_480B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 6144,
    "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 262144, "max_window_layers": 62,
    "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 2560, "norm_topk_prob": True,
    "num_attention_heads": 96, "num_experts": 160, "num_experts_per_tok": 8, "num_hidden_layers": 62,
    "num_key_value_heads": 8, "output_router_logits": False, "qkv_bias": False, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 10000000, "router_aux_loss_coef": 0.0, "shared_expert_intermediate_size": 0,
    "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.51.0",
    "use_cache": True, "use_qk_norm": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
KIMI_K2: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "auto_map": CODE,
    "aux_loss_alpha": 0.001, "bos_token_id": 163584, "eos_token_id": 163585, "first_k_dense_replace": 1,
    "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02, "intermediate_size": 18432,
    "kv_lora_rank": 512, "max_position_embeddings": 131072, "model_type": "kimi_k2", "moe_intermediate_size": 2048,
    "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 384, "n_shared_experts": 1, "norm_topk_prob": True,
    "num_attention_heads": 64, "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0, "pretraining_tp": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "quantization_config": FP8, "rms_norm_eps": 1e-06, "rope_theta": 50000.0,
    "rope_scaling": {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0,
                     "original_max_position_embeddings": 4096, "type": "yarn"},
    "routed_scaling_factor": 2.827, "scoring_func": "sigmoid", "seq_aux": True, "tie_word_embeddings": False,
    "topk_group": 1, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "transformers_version": "4.48.3",
    "use_cache": True, "v_head_dim": 128, "vocab_size": 163840,
}  # fmt: skip
MOONLIGHT = KIMI_K2 | {
    "ep_size": 1, "hidden_size": 2048, "intermediate_size": 11264, "max_position_embeddings": 8192,
    "model_type": "deepseek_v3", "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2,
    "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16,
    "num_nextn_predict_layers": 1, "q_lora_rank": None, "quantization_config": None, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "routed_scaling_factor": 2.446,
}  # fmt: skip
DEEPSEEK_V3 = KIMI_K2 | {
    "ep_size": 1, "first_k_dense_replace": 3, "max_position_embeddings": 163840, "model_type": "deepseek_v3",
    "n_group": 8, "n_routed_experts": 256, "num_attention_heads": 128, "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1, "rope_theta": 10000, "routed_scaling_factor": 2.5, "topk_group": 4,
    "rope_scaling": KIMI_K2["rope_scaling"] | {"beta_fast": 32, "beta_slow": 1, "factor": 40}, "vocab_size": 129280,
}  # fmt: skip
# What transformers 5.23 saves of a Llama that it read from a GGUF file.
FROM_GGUF = {key: value for key, value in SMOLLM2.items() if not key.startswith(("rope", "torch", "is_", "tr"))} | {
    "dtype": "float32", "_model_name_or_path": "SmolLM2", "unk_token_id": 0, "head_dim": 64,
    "rope_parameters": {"rope_theta": 130000.0, "rope_type": "default"}, "transformers_version": "5.23.0",
}  # fmt: skip
ON_LLAMA: dict[str, Any] = {
    "tokenizer_class": "LlamaTokenizer", "temperature": 0.6, "top_p": 0.9, "do_sample": True, "max_length": 4096,
    "model_max_length": 4096, "use_sliding_window": False, "bias": False, "torchscript": False,
    "gradient_checkpointing": False,
}  # fmt: skip


@pytest.mark.parametrize("config", [SMOLLM2, QWEN3_CODER_480B, FROM_GGUF, SMOLLM2 | ON_LLAMA, MOONLIGHT, DEEPSEEK_V3])
def test_published_configs_are_understood_and_kept(config):
    written = write_model(read_model(config), config)
    lost = {"quantization_config", "torch_dtype", "dtype"}
    assert {key for key in config if key not in lost} <= written.keys()


@pytest.mark.parametrize(
    ("config", "preset"),
    [(KIMI_K2, "kimi_k2"), (MOONLIGHT, "moonlight_16b_a3b"), (DEEPSEEK_V3, "deepseek_v3")],
)
def test_published_deepseek_shapes_are_the_presets(config, preset):
    model = load_config(str(ROOT / "configs" / "models" / f"{preset}.yaml"), ["train.num_steps=0"]).model
    assert compare_models(read_model(config), model) == []


def test_an_export_announces_neither_prediction_layers_nor_blocks():
    written = write_model(read_model(DEEPSEEK_V3), DEEPSEEK_V3)
    assert written["num_nextn_predict_layers"] == 0 and "quantization_config" not in written
    again = write_model(read_model(DEEPSEEK_V3), DEEPSEEK_V3 | {"num_mtp_layers": 1})
    assert again["num_nextn_predict_layers"] == 0 and "num_mtp_layers" not in again


def test_the_user_is_told_of_keys_that_only_others_read():
    assert left_aside(SMOLLM2) == ["is_llama_config", "rope_interleaved", "transformers.js_config"]
    assert left_aside(DEEPSEEK_V3) == []
