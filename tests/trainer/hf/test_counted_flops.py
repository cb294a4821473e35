"""Model FLOPs against a count of the matrix multiplications that transformers' models really run."""

from __future__ import annotations

from typing import Any

import pytest

from configs.plan.flops import model_flops
from configs.sections.model import ModelConfig

DOCUMENTS = (48, 31, 1)  # tokens of each, attended alone
SIZES: dict[str, Any] = {
    "num_layers": 3, "hidden_size": 64, "ffn_hidden_size": 160, "num_attention_heads": 8, "num_query_groups": 2,
    "vocab_size": 250, "max_position_embeddings": 128,
}  # fmt: skip
EXPERTS = {"num_experts": 8, "top_k": 2, "ffn_hidden_size": 48}
LATENT = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}
DEEPSEEK = {
    "num_query_groups": None,
    "norm_eps": 1e-6,
    "rope": {"interleaved": True},
    "moe": EXPERTS
    | {"num_dense_layers": 1, "shared_expert_ffn_hidden_size": 96, "score_function": "sigmoid", "balancing": "bias"}
    | {"num_groups": 4, "group_top_k": 1, "scaling_factor": 2.5},
}
MODELS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "wide_heads": {"head_dim": 24, "qk_norm": True},
    "tied": {"tie_embeddings": True},
    "experts": {"qk_norm": True, "head_dim": 16, "moe": EXPERTS},
    "latent": DEEPSEEK | {"mla": LATENT | {"q_lora_rank": 24}},
    "latent_keys_alone": DEEPSEEK | {"mla": LATENT},
}


@pytest.mark.parametrize("name", MODELS)
def test_model_flops_are_those_of_the_multiplications_under_the_causal_mask(name):
    """Three times the forward pass, less half of the attention core, which transformers computes whole."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForCausalLM

    from trainer.hf.config_json import write_model

    model = ModelConfig.model_validate(SIZES | MODELS[name])
    theirs = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**write_model(model)), attn_implementation="eager", experts_implementation="eager"
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for length in DOCUMENTS:
            theirs(torch.randint(0, 250, (1, length)), use_cache=False)
    num_pairs = sum(length**2 for length in DOCUMENTS)
    head = 24 + 12 if model.mla else 2 * (model.head_dim or 8)  # of query and key, and of value
    causal_half = model.num_layers * model.num_attention_heads * head * num_pairs
    assert model_flops(model, sum(DOCUMENTS), model.num_layers * num_pairs) == 3 * (
        counter.get_total_flops() - causal_half
    )
