"""Keys of `config.json` that are no field of ours: those that change nothing, and those that compute. Torch-free.

The rule: a key is inert if transformers' model of the family gives the same logits with and without it. So is every
key that its classes do not read. tests/trainer/hf/test_flipped_keys.py records what they read in each family: what
they read must stand in the family's table or here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

# Read by transformers, but not to compute logits from weights; or so common that a word about them would say nothing.
INERT = frozenset(
    # what the model is called, who wrote it, and in which number format
    "architectures model_type dtype torch_dtype transformers_version _name_or_path name_or_path _model_name_or_path "
    "auto_map _commit_hash unsloth_fixed unsloth_version "
    # tokens and text
    "bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id tokenizer_class "
    "model_max_length "
    # what a forward pass returns, and labels of other heads
    "use_cache return_dict use_return_dict output_attentions _output_attentions output_hidden_states "
    "output_router_logits id2label label2id num_labels problem_type task_specific_params keys_to_ignore_at_inference "
    "tie_last_hidden_states "
    # which kernels compute it, on which devices
    "_attn_implementation _attn_implementation_internal _attn_implementation_autoset attn_implementation "
    "_experts_implementation _experts_implementation_internal experts_implementation _flash_attn_2_enabled "
    "chunk_size_feed_forward pretraining_tp gradient_checkpointing torchscript base_model_tp_plan base_model_pp_plan "
    "base_model_ep_plan base_model_fsdp_plan "
    # generation
    "max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty "
    "temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size "
    "encoder_no_repeat_ngram_size encoder_repetition_penalty bad_words_ids num_return_sequences output_scores "
    "return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values suppress_tokens "
    "begin_suppress_tokens exponential_decay_length_penalty epsilon_cutoff eta_cutoff assistant_confidence_threshold "
    "assistant_lookbehind target_lookbehind num_assistant_tokens num_assistant_tokens_schedule "
    # of other architectures, which transformers' shared code looks for in vain here
    "mtp_layer_types mlp_layer_types num_heads max_window_layers vision_aspect_ratio vision_feature_layer "
    "vision_feature_select_strategy".split()
)
# Keys with which transformers computes in every family, and the values that change nothing.
COMPUTED: dict[str, tuple[Any, ...]] = {
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "attention_chunk_size": (),
    "per_layer_config": (),
    "kv_sharing_modes": (),
    "text_config": (),
    "decoder": (),
    "generator": (),
    "text_encoder": (),
    "transformers_weights": (),
    "fusion_config": (),
    # Constants and inner state of the config's class, which a key of the same name would replace.
    "attribute_map": (),
    "default_theta": (),
    "default_rope_type": ("default",),
    "sub_configs": (),
    "sub_configs_defaults": (),
    "ignore_keys_at_rope_validation": (),
    "base_config_key": (),
    "has_no_defaults_at_init": (),
    "extra_files": (),
    "extra_config_files": (),
    "_heterogeneity_spec": (),
    "_post_init_done": (),
    "_rope_type_labels": (),
}


def check_other_keys(config: Mapping[str, Any], handled: Collection[str]) -> list[str]:
    """Return one sentence for each key outside `handled` that transformers computes with at the value it has."""
    problems = []
    for key in sorted(COMPUTED.keys() & config.keys() - set(handled)):
        if config[key] is not None and config[key] not in COMPUTED[key]:
            only = ", ".join(map(repr, COMPUTED[key])) or "null"
            problems.append(f"{key}: {config[key]!r} is not supported, only {only}")
    kinds = {str(kind) for kind in config.get("layer_types") or ()} - {"full_attention"}
    if kinds and "layer_types" not in handled:
        problems.append(f"layer_types: {', '.join(sorted(kinds))} is not supported, only full_attention")
    return problems


def keys_left_aside(config: Mapping[str, Any], handled: Collection[str]) -> list[str]:
    """Return the keys that neither we nor transformers' model of the family know, worth a word to the user."""
    known = INERT | COMPUTED.keys() | set(handled) | {"layer_types"}
    return sorted(key for key in config.keys() - known if config[key] is not None)
