"""Rotary embeddings of `config.json` in old and new spelling: read as transformers computes, written in their style."""

from __future__ import annotations

from typing import Any

import pytest

from configs.errors import BadInput
from configs.sections.model import ModelConfig, RopeConfig
from tests.trainer.hf.test_config_json import LLAMA
from tests.trainer.hf.test_published import DEEPSEEK_V3
from trainer.hf.config_json import read_model, write_model

CONTEXT = 512
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# name: what config.json says inside, and what it means
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "abf": ({"rope_type": "default"}, {}),
    "linear": ({"rope_type": "linear", "factor": 4}, {"scaling": "linear", "factor": 4.0}),
    "dynamic": (
        {"rope_type": "dynamic", "factor": 4.0},
        {"scaling": "dynamic", "factor": 4.0, "original_max_position_embeddings": CONTEXT},
    ),
    "llama3": (
        LLAMA3 | {"original_max_position_embeddings": 128},
        {"scaling": "llama3", "factor": 4.0, "original_max_position_embeddings": 128},
    ),
    "llama3_of_the_context": (
        LLAMA3, {"scaling": "llama3", "factor": 4.0, "original_max_position_embeddings": CONTEXT},
    ),
    "yarn": (YARN, {"scaling": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}),
    "yarn_of_the_context": (
        {"rope_type": "yarn", "factor": 4.0},
        {"scaling": "yarn", "factor": 4.0, "original_max_position_embeddings": CONTEXT},
    ),
    "yarn_attention_factor": (
        YARN | {"attention_factor": 1.5, "mscale": 0.5, "mscale_all_dim": 0.7, "truncate": False},
        {"scaling": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "attention_factor": 1.5,
         "truncate": False},
    ),
    "yarn_mscale": (
        YARN | {"mscale": 0.5, "mscale_all_dim": 0.7, "beta_fast": 16, "beta_slow": 2},
        {"scaling": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "mscale": 0.5,
         "mscale_all_dim": 0.7, "beta_fast": 16.0, "beta_slow": 2.0},
    ),
}  # fmt: skip
# A kind each that a stage may change to, and the length it then is meant for.
CHANGES = [
    RopeConfig(base=1e6),
    RopeConfig(base=1e6, scaling="linear", factor=8.0),
    RopeConfig(base=1e6, scaling="dynamic", factor=8.0, original_max_position_embeddings=CONTEXT),
    RopeConfig(base=1e6, scaling="llama3", factor=8.0, original_max_position_embeddings=CONTEXT),
    RopeConfig(
        base=1e6, scaling="yarn", factor=8.0, original_max_position_embeddings=CONTEXT, attention_factor=0.9,
        truncate=False,
    ),
    RopeConfig(base=1e6, scaling="yarn", factor=8.0, original_max_position_embeddings=CONTEXT),
]  # fmt: skip


def spelled(style: str, inside: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a Llama that says `inside` in a style."""
    config = {key: value for key, value in LLAMA.items() if not key.startswith("rope")}
    config |= {"max_position_embeddings": CONTEXT, "rope_theta": 5e5}
    is_default = inside.get("rope_type") == "default"
    if style == "new":
        return config | {"rope_parameters": inside | {"rope_theta": 5e5}}
    if style == "old_type":
        inside = {"type" if key == "rope_type" else key: value for key, value in inside.items()}
    if style == "old_original_outside" and "original_max_position_embeddings" in inside:
        inside = dict(inside)
        config["original_max_position_embeddings"] = inside.pop("original_max_position_embeddings")
    return config | {"rope_scaling": None if is_default else inside}


@pytest.mark.parametrize("style", ["new", "old", "old_type", "old_original_outside"])
@pytest.mark.parametrize("name", KINDS)
def test_every_spelling_is_read_and_written_word_for_word(name, style):
    inside, fields = KINDS[name]
    config = spelled(style, inside)
    model = read_model(config)
    assert model.rope == RopeConfig(**{"base": 5e5} | fields)
    assert model.max_position_embeddings == CONTEXT * (4 if name == "dynamic" else 1)
    written = write_model(model, config)
    assert {key: value for key, value in written.items() if key in config} == config


def transformers_frequencies(config: dict[str, Any], length: int) -> tuple[Any, float]:
    """Return the inverse frequencies and the factor on attention of transformers' Llama for a sequence."""
    import torch
    import transformers
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    embedding = LlamaRotaryEmbedding(transformers.LlamaConfig.from_dict(dict(config)))
    embedding(torch.zeros(1), torch.arange(length).unsqueeze(0))
    return embedding.inv_freq, embedding.attention_scaling


@pytest.mark.parametrize("style", ["new", "old_type", "old_original_outside"])
@pytest.mark.parametrize("changed", CHANGES, ids=lambda rope: f"to_{rope.scaling}")
@pytest.mark.parametrize("name", ["abf", "dynamic", "llama3", "yarn_attention_factor"])
def test_a_stage_with_another_rotation_is_written_without_what_was(name, changed, style):
    """In the carried style, the same to transformers as a config of our own, with no key of the old kind left."""
    import torch

    config = spelled(style, KINDS[name][0]) | {"model_max_length": CONTEXT}
    longer = read_model(config).model_copy(update={"rope": changed, "max_position_embeddings": 8 * CONTEXT})
    written = write_model(longer, config)
    fresh = write_model(longer)
    is_dynamic = changed.scaling == "dynamic"
    assert written["model_max_length"] == 8 * CONTEXT
    assert written["max_position_embeddings"] == (CONTEXT if is_dynamic else 8 * CONTEXT)
    assert ("rope_parameters" in written) == (style == "new") != ("rope_scaling" in written)
    inside = written.get("rope_parameters") or written["rope_scaling"] or {}
    expected = fresh["rope_parameters"].keys() - {"rope_theta"}
    if "original_max_position_embeddings" in written:
        assert style == "old_original_outside"
        expected = expected - {"original_max_position_embeddings"}
    assert {"rope_type" if key == "type" else key for key in inside} - {"rope_theta"} in (expected, set())
    assert ("type" in inside) == (style == "old_type" and changed.scaling != "none" and name != "abf")
    for length in (CONTEXT + 1, 8 * CONTEXT):
        found, factor = transformers_frequencies(written, length)
        wanted, wanted_factor = transformers_frequencies(fresh, length)
        assert torch.equal(found, wanted) and factor == wanted_factor
    assert read_model(written) == longer.model_copy(update={"head_dim": read_model(written).head_dim})


def test_a_factor_on_attention_of_latent_attention_keeps_that_of_its_softmax():
    scaling = DEEPSEEK_V3["rope_scaling"] | {"attention_factor": 1.25, "mscale": 0.5, "mscale_all_dim": 0.7}
    config = DEEPSEEK_V3 | {"rope_scaling": scaling}
    rope = read_model(config).rope
    assert (rope.attention_factor, rope.mscale, rope.mscale_all_dim) == (1.25, 1.0, 0.7)
    written = write_model(read_model(config).model_copy(update={"max_position_embeddings": 10240}), DEEPSEEK_V3)
    assert written["rope_scaling"]["attention_factor"] == 1.25 and written["rope_scaling"]["mscale_all_dim"] == 0.7
    assert "mscale" not in written["rope_scaling"] and written["rope_scaling"]["type"] == "yarn"


@pytest.mark.parametrize(
    ("inside", "outside", "expected"),
    [
        ({"rope_type": "longrope", "long_factor": [2]}, {}, "rope_type 'longrope' is not supported"),
        ({"rope_type": "dynamic"}, {}, "rope_parameters.factor: missing with rope_type dynamic"),
        ({"rope_type": "dynamic", "factor": 1.0}, {}, "model.rope.factor: 1 extends nothing"),
        ({"rope_type": "dynamic", "factor": -1.0}, {}, "model.rope.factor -1.0"),
        ({"rope_type": "dynamic", "factor": 1e400}, {}, "model.rope.factor inf"),
        ({"rope_type": "dynamic", "factor": "4"}, {}, "model.rope.factor '4'"),
        (
            {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 128}, {},
            "original_max_position_embeddings: 128 is not understood with rope_type dynamic",
        ),
        ({"rope_type": "dynamic", "factor": 4.0, "truncate": True}, {}, "truncate: True is not understood"),
        (YARN | {"attention_factor": 0.0}, {}, "model.rope.attention_factor 0.0"),
        (YARN, {"original_max_position_embeddings": 256}, "256 beside 128 in rope_parameters; keep one"),
        (LLAMA3, {"original_max_position_embeddings": 1024}, "original_max_position_embeddings: 1024 exceeds"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_by_name(inside, outside, expected):
    with pytest.raises(BadInput) as caught:
        read_model(spelled("old", inside) | outside)
    assert expected in str(caught.value)


def test_latent_attention_takes_no_dynamic_scaling():
    with pytest.raises(BadInput, match="latent attention has no dynamic; values that would work: none, yarn"):
        read_model(DEEPSEEK_V3 | {"rope_scaling": {"type": "dynamic", "factor": 4.0}})


def test_an_old_checkpoint_has_the_defaults():
    fields = ModelConfig.model_validate(read_model(LLAMA).model_dump()).model_dump()
    del fields["rope"]["truncate"], fields["rope"]["attention_factor"]
    assert ModelConfig.model_validate(fields) == read_model(LLAMA)
