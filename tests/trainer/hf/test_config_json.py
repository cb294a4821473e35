"""config.json to our model section and back: nothing is dropped, and what cannot be said is refused by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from configs.errors import BadInput
from configs.load import load_config
from configs.plan.derive import layer_windows
from configs.sections.model import ModelConfig, RopeConfig
from trainer.hf.config_json import compare_models, load_config_json, read_model, write_model
from trainer.hf.families import FAMILIES

ROOT = Path(__file__).resolve().parents[3]
PRESETS = {
    "llama3_1_8b": "LlamaForCausalLM",
    "llama3_2_1b": "LlamaForCausalLM",
    "qwen3_8b": "Qwen3ForCausalLM",
    "mixtral_8x7b": "MixtralForCausalLM",
    "qwen3_30b_a3b": "Qwen3MoeForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "tiny": "LlamaForCausalLM",
}
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "torch_dtype": "bfloat16", "attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "use_cache": True,
}  # fmt: skip


def preset(name: str) -> ModelConfig:
    return load_config(str(ROOT / "configs" / "models" / f"{name}.yaml"), ["train.num_steps=0"]).model


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_written_and_read_back_the_same(name):
    model = preset(name)
    config = write_model(model)
    assert config["architectures"] == [PRESETS[name]]
    assert compare_models(model, read_model(config)) == []


@pytest.mark.parametrize("name", PRESETS)
def test_transformers_reads_what_is_written(name):
    """transformers' own config class sees the same values, in its own words."""
    import transformers

    config = write_model(preset(name))
    theirs = transformers.AutoConfig.for_model(**config)
    again = {key: value for key, value in theirs.to_diff_dict().items() if value is not None}
    assert compare_models(preset(name), read_model(again | {"architectures": config["architectures"]})) == []


def test_published_llama_3_1_is_the_preset():
    assert compare_models(read_model(LLAMA), preset("llama3_1_8b")) == []


def test_a_carried_config_keeps_its_style_and_its_other_keys():
    written = write_model(read_model(LLAMA), LLAMA | {"bos_token_id": 128000})
    assert written["rope_theta"] == 500000.0 and "rope_parameters" not in written
    assert written["rope_scaling"] == LLAMA["rope_scaling"] and written["bos_token_id"] == 128000


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_scaling": None},
        {},
    ],
)
def test_every_style_of_rope_can_be_written_over(rope):
    """Also after the context was changed, and where the carried config named no base or named it twice."""
    carried = {key: value for key, value in LLAMA.items() if not key.startswith("rope")} | rope
    model = read_model(carried)
    changed = model.model_copy(update={"rope": RopeConfig(base=1e6, scaling="linear", factor=4.0)})
    for one in (model, changed):
        assert compare_models(one, read_model(write_model(one, carried))) == []


def test_a_changed_context_is_written():
    model = read_model(LLAMA)
    longer = model.model_copy(
        update={"max_position_embeddings": 262144, "rope": model.rope.model_copy(update={"factor": 16.0})}
    )
    written = write_model(longer, LLAMA)
    assert written["max_position_embeddings"] == 262144 and written["rope_scaling"]["factor"] == 16.0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"architectures": ["GptOssForCausalLM"]}, "architectures ['GptOssForCausalLM'] cannot be converted"),
        ({"architectures": None}, "architectures [] cannot be converted"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported, only 'silu'"),
        ({"attention_bias": True}, "only both or neither"),
        ({"is_causal": False}, "is_causal: False is not supported, only True"),
        ({"text_config": {"logit_scale": 2.0}}, "text_config: {'logit_scale': 2.0} is not supported, only null"),
        ({"default_theta": 5.0}, "default_theta: 5.0 is not supported, only null"),
        ({"sliding_window": 512}, "sliding_window: attention within 512 tokens is not supported"),
        ({"model_type": "gemma"}, "model_type: 'gemma' is not supported, only 'llama'"),
        ({"num_hidden_layers": None}, "num_hidden_layers: missing"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_type 'longrope' is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_parameters.factor: missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 3}}, "beta_fast: 3 is not understood"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5 is not supported"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types: sliding_attention is not supported"),
        (
            {"architectures": ["Qwen3ForCausalLM"], "layer_types": ["sliding_attention"] * 32},
            "layer_types: sliding_attention is not supported without use_sliding_window",
        ),
        ({"architectures": ["Qwen2ForCausalLM"], "layer_types": ["chunked_attention"]}, "chunked_attention is not sup"),
        ({"architectures": ["Qwen2ForCausalLM"], "layer_types": ["full_attention"]}, "layer_types: 1 of them for"),
        ({"num_attention_heads": 31}, "model.head_dim"),
        ({"rope_parameters": {"rope_type": "default"}}, "both given"),
        ({"rope_scaling": None, "rope_parameters": {"rope_theta": 7.0}}, "rope_theta: 500000.0 beside 7.0"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, "is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_parameters.low_freq_factor: missing"),
        ({"architectures": 5}, "architectures 5 cannot be converted"),
        ({"architectures": [{"a": 1}]}, "cannot be converted"),
        ({"num_attention_heads": "four"}, "model.num_attention_heads 'four'"),
        ({"hidden_size": -64}, "model.hidden_size -64"),
        ({"rms_norm_eps": float("nan")}, "model.norm_eps nan"),
        ({"tie_word_embeddings": "yes"}, "model.tie_embeddings 'yes'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -2.0}}, "model.rope.factor -2.0"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": "x"}, "value of the wrong kind"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(changes, expected):
    config = LLAMA | changes
    if config["architectures"] != LLAMA["architectures"]:
        config = {key: value for key, value in config.items() if key not in ("attention_bias", "mlp_bias")}
    with pytest.raises(BadInput) as caught:
        read_model(config)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


# architecture, its keys, which layers have the window of 4096
WINDOWS = {
    "mistral_7b_v0_1": ("MistralForCausalLM", {"sliding_window": 4096}, [True] * 32),
    "mistral_by_default": ("MistralForCausalLM", {}, [True] * 32),
    "mistral_7b_v0_3": ("MistralForCausalLM", {"sliding_window": None}, None),
    "longer_than_the_context": ("MistralForCausalLM", {"sliding_window": 131072}, None),
    "qwen2_off": ("Qwen2ForCausalLM", {"sliding_window": 4096, "max_window_layers": 0}, None),
    "qwen2": (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 21},
        [False] * 21 + [True] * 11,
    ),
    "qwen3_alternating": (
        "Qwen3ForCausalLM",
        {
            "use_sliding_window": True,
            "sliding_window": 4096,
            "max_window_layers": 3,
            "layer_types": ["sliding_attention", "full_attention"] * 16,
        },
        [True, False] * 16,
    ),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_come_in_and_go_out(name):
    """Imported, exported over the keys they came with, and exported as a model of our own."""
    architecture, keys, windowed = WINDOWS[name]
    config = {key: value for key, value in LLAMA.items() if key not in ("attention_bias", "mlp_bias")}
    config |= {"architectures": [architecture], "model_type": architecture.removesuffix("ForCausalLM").lower()} | keys
    model = read_model(config)
    assert model.window_size == (None if windowed is None else 4096)
    assert [window is not None for window in layer_windows(model)] == (windowed or [False] * 32)
    for written in (write_model(model, config), write_model(model)):
        assert layer_windows(read_model(written)) == layer_windows(model)
        assert windowed is None or written["architectures"] == [architecture]


def test_what_no_family_says_is_refused():
    model = ModelConfig(num_layers=2, hidden_size=64, ffn_hidden_size=64, num_attention_heads=4, vocab_size=61)
    with pytest.raises(BadInput, match="model.attention_sinks: True, not False"):
        write_model(model.model_copy(update={"attention_sinks": True}))
    with pytest.raises(BadInput, match="model.window_pattern: "):
        write_model(model.model_copy(update={"window_size": 8, "window_pattern": (True, False)}))


@pytest.mark.parametrize(
    "fields",
    [
        {"qk_norm": True},
        {"qk_norm": True, "num_query_groups": None},
        {"num_query_groups": None, "moe": {"num_experts": 4, "ffn_hidden_size": 64}},
        {"num_query_groups": None, "qk_norm": True, "moe": {"num_experts": 4, "ffn_hidden_size": 64}},
        {"num_query_groups": None},
    ],
)
def test_what_follows_from_other_fields_is_written_out(fields):
    """A family's own default for a missing key may be another than ours."""
    model = ModelConfig.model_validate(preset("tiny").model_dump() | {"head_dim": None} | fields)
    assert compare_models(model, read_model(write_model(model))) == []


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"norm": "layernorm"}, "model.norm"),
        ({"activation": "gelu"}, "model.activation"),
        ({"rope": {"fraction": 0.5}}, "model.rope.fraction"),
        ({"qkv_bias": True, "qk_norm": True}, "model.qkv_bias"),
        ({"mla": {"kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}}, "model.mla"),
    ],
)
def test_a_model_that_no_family_has_is_not_written(fields, expected):
    model = ModelConfig.model_validate(preset("tiny").model_dump() | fields)
    with pytest.raises(BadInput) as caught:
        write_model(model)
    assert expected in str(caught.value)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_missing_keys_mean_what_transformers_takes(architecture):
    import transformers

    theirs = getattr(transformers, architecture.replace("ForCausalLM", "Config"))()
    options = [option for option in FAMILIES[architecture].options if option.default is not None]
    assert len(options) >= 5
    for option in options:
        assert getattr(theirs, option.key) == option.default, option


@pytest.mark.parametrize(
    "extra", [{"use_mrope": False}, {"rope_interleaved": False}, {"_attn_implementation": "eager"}]
)
def test_what_published_configs_say_beside_is_understood(extra):
    assert read_model(LLAMA | extra) == read_model(LLAMA)


def test_every_option_is_a_field():
    for family in FAMILIES.values():
        for option in family.options:
            head, _, rest = option.field.partition(".")
            assert head in ModelConfig.model_fields, option
            if rest:
                section = {"moe": "MoeConfig", "mla": "MlaConfig"}[head]
                import configs.sections.model

                assert rest in getattr(configs.sections.model, section).model_fields, option


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(BadInput, match=r"config\.json: is a pipe, not a file"):
        load_config_json(tmp_path)
