"""Every key of every family's config.json dropped or changed: what is accepted computes what transformers computes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

from configs.errors import BadInput
from trainer.hf.config_json import left_aside, read_model, write_model
from trainer.hf.families import FAMILIES
from trainer.hf.other_keys import COMPUTED, INERT
from trainer.hf.quantisation import QUANTISATION_KEY
from trainer.hf.rope_json import ROPE_KEYS

SHARED: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
LATENT: dict[str, Any] = {
    "kv_lora_rank": 8, "q_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
    "num_key_value_heads": 4, "n_routed_experts": 8, "moe_intermediate_size": 16, "n_shared_experts": 1,
    "num_experts_per_tok": 4, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 1.0,
    "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
CHANGES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"rope_theta": 5e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "MistralForCausalLM": {"sliding_window": None, "head_dim": 12},
    "Qwen2ForCausalLM": {"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 1},
    "Qwen3ForCausalLM": {"head_dim": 16, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "MixtralForCausalLM": {"num_local_experts": 4, "sliding_window": None},
    "Qwen3MoeForCausalLM": {
        "use_sliding_window": True, "sliding_window": 7,
        "num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2, "norm_topk_prob": True, "head_dim": 16,
        "mlp_only_layers": [], "decoder_sparse_step": 1,
    },
    "DeepseekV2ForCausalLM": LATENT | {"topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False},
    "DeepseekV3ForCausalLM": LATENT | {
        "n_group": 2, "topk_group": 2, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "rope_scaling": YARN,
        "norm_topk_prob": True, "num_nextn_predict_layers": 1,
    },
}  # fmt: skip
# What published configs say beside, and what other families compute with.
OTHERS: dict[str, tuple[Any, ...]] = {
    "is_causal": (False, True), "is_encoder_decoder": (True, False), "default_theta": (5.0,),
    "attention_chunk_size": (4,),
    "attention_bias": (True, False),
    "is_llama_config": (True,), "transformers.js_config": ({"dtype": "q4"},), "qkv_bias": (False, True),
    "use_qk_norm": (True, False), "qk_layernorm": (True,), "shared_expert_intermediate_size": (0, 16), "bias": (True,),
    "rope_interleaved": (False, True), "use_mrope": (True,), "use_sliding_window": (False, True), "use_bias": (True,),
    "logit_scale": (2.0,), "logits_scaling": (8.0,), "embedding_multiplier": (12.0,), "residual_multiplier": (0.2,),
    "attention_multiplier": (0.1,), "attn_logit_softcapping": (5.0,), "final_logit_softcapping": (5.0,),
    "query_pre_attn_scalar": (7,), "clip_qkv": (0.01,), "norm_eps": (0.5,), "layer_norm_eps": (0.5,),
    "no_rope_layers": ([0, 0],), "attn_temperature_tuning": (True,), "parallel_attn": (True,), "alibi": (True,),
    "expert_bias": (True,), "scale_depth": (1.4,), "mup_base_width": (8,), "original_max_position_embeddings": (8, 32),
    "partial_rotary_factor": (0.5, 1.0), "rotary_pct": (0.25,), "activation_function": ("gelu",), "n_embd": (16,),
    "qk_norm": (True,), "attention_dropout": (0.0,), "swiglu_limit": (0.1,), "router_scale": (3.0,), "kv_heads": (1,),
    "hidden_activation": ("gelu",), "head_dim": (4, 8), "qk_head_dim": (3,), "num_experts": (2,), "layer_types":
    (["full_attention"] * 2, ["sliding_attention"] * 2, ["full_attention"], ["sliding_attention", "full_attention"]),
    "model_type": ("gemma", "llama", "qwen3"),
    "num_local_experts": (2,), "num_mtp_layers": (2,), "rope_parameters": ({"rope_type": "default"}, {"factor": 2.0}),
    "rope_scaling": (
        {"type": "linear", "factor": 3.0}, {"type": "dynamic", "factor": 2.0}, YARN, YARN | {"truncate": False},
        YARN | {"truncate": None}, YARN | {"beta_slow": 2.0, "beta_fast": 9.0}, YARN | {"finetuned": True},
        YARN | {"attention_factor": 1.3}, YARN | {"attention_factor": 1.3, "mscale": 0.5}, YARN | {"mscale": None},
        YARN | {"attention_factor": 0.8, "mscale_all_dim": None}, YARN | {"original_max_position_embeddings": None},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0, 1.0], "long_factor": [2.0, 2.0]},
        {"rope_type": "proportional", "factor": 2.0}, {"rope_type": "dynamic", "factor": 1.0},
    ),
}  # fmt: skip


def base_config(architecture: str) -> dict[str, Any]:
    names = {"architectures": [architecture], "model_type": FAMILIES[architecture].model_type}
    switches = {"attention_bias": False} if "attention_bias" in FAMILIES[architecture].handled else {}
    return names | SHARED | switches | {"hidden_act": "silu"} | CHANGES[architecture]


def other_values(value: Any) -> Iterator[Any]:
    """Yield further values of the same kind, and of others where nothing says what kind it is."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, (int, float)):
        yield from (value * 2, value + 1, type(value)(0))
    elif value is None:
        yield from (True, 1, 2, 8, 0.5, "some")


def own_flips(architecture: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every key that the family's table or a published config knows: dropped, null, and changed."""
    base = base_config(architecture)
    for key in sorted(FAMILIES[architecture].handled | ROPE_KEYS | base.keys() | OTHERS.keys()):
        if key in base:
            yield key, {name: value for name, value in base.items() if name != key}
            yield key, base | {key: None}
        for value in OTHERS.get(key) or other_values(base.get(key)):
            yield key, base | {key: value}


def further_flips(architecture: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every key that transformers reads in all families, or that another family knows, with values of kinds."""
    base = base_config(architecture)
    known = {key for family in FAMILIES.values() for key in family.handled}
    for key in sorted((known | INERT | COMPUTED.keys()) - base.keys()):
        for value in (True, 2, "some"):
            yield key, base | {key: value}


def transformers_logits(config: dict[str, Any]) -> Any:
    """Return the logits of transformers' model with weights that follow from their names; None if it refuses."""
    import torch
    import transformers

    try:
        theirs = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
        model = transformers.AutoModelForCausalLM.from_config(theirs, dtype=torch.float32).eval()
        with torch.no_grad():
            for name, tensor in sorted(model.state_dict().items()):
                steps = torch.arange(tensor.numel(), dtype=torch.float32) * (1 + len(name) % 7) + sum(name.encode())
                tensor.copy_((steps.sin() * 0.4 + (tensor.dim() == 1)).reshape(tensor.shape))
            return model(torch.arange(24).reshape(1, 24) * 5 % 61).logits
    except Exception:  # whatever the reason: it computes nothing that ours could differ from
        return None


@cache
def cached_logits(config: str) -> Any:
    return transformers_logits(json.loads(config))


def check(architecture: str, key: str, config: dict[str, Any]) -> bool:
    """Return whether the config is accepted, after comparing what it computes with what we take it for."""
    import torch

    try:
        model = read_model(config)
    except BadInput:
        return False
    found = transformers_logits(config)
    if found is not None:
        ours = cached_logits(json.dumps(write_model(model, base_config(architecture)), sort_keys=True))
        assert ours is not None and torch.allclose(found, ours, atol=1e-6, rtol=0), f"{key}: {config.get(key)!r}"
    return True


@pytest.mark.parametrize("architecture", FAMILIES)
def test_no_key_is_accepted_that_changes_what_is_computed(architecture):
    base = base_config(architecture)
    assert check(architecture, "base", base) and transformers_logits(base) is not None
    accepted = [check(architecture, key, config) for key, config in own_flips(architecture)]
    assert len(accepted) > 140 and 60 < sum(accepted) < len(accepted) - 40


@pytest.mark.slow
@pytest.mark.parametrize("architecture", FAMILIES)
def test_no_key_of_other_families_is_accepted_that_changes_what_is_computed(architecture):
    accepted = [check(architecture, key, config) for key, config in further_flips(architecture)]
    assert len(accepted) > 250 and 200 < sum(accepted)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_what_transformers_reads_has_been_judged(architecture, tmp_path, monkeypatch):
    """A key that a new version of transformers reads stands in no table, and fails here."""
    import torch
    import transformers
    from transformers.configuration_utils import PreTrainedConfig

    config = base_config(architecture)
    theirs = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    transformers.AutoModelForCausalLM.from_config(theirs).save_pretrained(tmp_path)
    read: set[str] = set()
    plain = PreTrainedConfig.__getattribute__

    def record(self: Any, name: str) -> Any:
        read.add(name)
        return plain(self, name)

    monkeypatch.setattr(PreTrainedConfig, "__getattribute__", record)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        model(torch.arange(24).reshape(1, 24))
        model.generate(torch.arange(9).reshape(1, 9), max_new_tokens=2)
    monkeypatch.undo()
    assert len(read) > 50
    constants = {name for name in vars(PreTrainedConfig) if not name.startswith("_")}
    constants = {name for name in constants if not callable(getattr(PreTrainedConfig, name))}
    own = type(theirs).attribute_map.keys()
    names = {name for name in read if not name.startswith("__")} - (set(dir(PreTrainedConfig)) - constants)
    judged = FAMILIES[architecture].handled | INERT | COMPUTED.keys() | ROPE_KEYS | {QUANTISATION_KEY, "layer_types"}
    assert sorted((names | constants | own) - judged) == []


def test_keys_that_nobody_reads_are_told():
    config = base_config("LlamaForCausalLM") | {"is_llama_config": True, "temperature": 0.6, "logit_scale": None}
    assert left_aside(config) == ["is_llama_config"]
