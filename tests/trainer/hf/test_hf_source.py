"""A model directory: further tensors that are expected are left aside, others are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from configs.errors import BadInput
from trainer.hf.config_json import read_model
from trainer.hf.families import FAMILIES
from trainer.hf.source import HfModel
from trainer.hf.tensors import model_rules

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 11, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip
DEEPSEEK = LLAMA | {
    "architectures": ["DeepseekV3ForCausalLM"], "num_hidden_layers": 2, "n_routed_experts": 2,
    "num_experts_per_tok": 2, "moe_intermediate_size": 8, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    "q_lora_rank": None, "kv_lora_rank": 4, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4,
    "num_nextn_predict_layers": 1,
}  # fmt: skip


def write(directory: Path, config: dict, further: dict[str, torch.Tensor]) -> Path:
    """Write a model of random weights and further tensors."""
    from safetensors.torch import save_file

    names = FAMILIES[config["architectures"][0]].names
    parts = [part for rule in model_rules(read_model(config), names) for part in rule.hf]
    tensors = {part.name: torch.randn(part.shape) for part in parts} | further
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_multi_token_prediction_is_left_aside_by_name(tmp_path):
    name = "model.layers.2.eh_proj.weight"
    assert HfModel(write(tmp_path, DEEPSEEK, {name: torch.zeros(2)})).ignored == [name]


def test_what_follows_from_the_config_is_no_tensor_of_the_model(tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    assert HfModel(write(tmp_path, LLAMA, {name: torch.zeros(4)})).ignored == []


@pytest.mark.parametrize("is_same", [True, False])
def test_a_tied_output_layer_must_be_the_embedding(tmp_path, is_same):
    tied, table = LLAMA | {"tie_word_embeddings": True}, torch.randn(11, 16)
    both = {"model.embed_tokens.weight": table, "lm_head.weight": table.clone() if is_same else table + 1}
    write(tmp_path, tied, both)
    if is_same:
        assert HfModel(tmp_path).ignored == []
        return
    with pytest.raises(BadInput, match="differs from model.embed_tokens.weight"):
        HfModel(tmp_path)


def write_base_model(directory: Path, config: dict, extra: dict[str, torch.Tensor]) -> Path:
    """Write what `LlamaModel.save_pretrained` writes: no `model.` before the names, no output layer."""
    from safetensors.torch import load_file, save_file

    write(directory, config, {})
    tensors = load_file(directory / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    save_file(bare | extra, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "LlamaModel"])
def test_a_base_model_with_tied_embeddings_is_whole(tmp_path, architecture):
    config = LLAMA | {"tie_word_embeddings": True}
    write_base_model(tmp_path, config, {"layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)})
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": [architecture]}))
    model = HfModel(tmp_path)
    assert model.read("decoder.layers.0.mlp.linear_fc2.weight").shape == (16, 24) and model.ignored == []


def test_a_base_model_without_an_output_layer_is_called_that(tmp_path):
    with pytest.raises(BadInput, match=r"a base model without an output layer \(lm_head.weight\).* LlamaForCausalLM"):
        HfModel(write_base_model(tmp_path, LLAMA, {}))


def test_a_base_model_beside_an_output_layer_is_whole(tmp_path):
    output = torch.randn(11, 16)
    model = HfModel(write_base_model(tmp_path, LLAMA, {"lm_head.weight": output}))
    assert torch.equal(model.read("output_layer.weight")[:11], output)


def test_a_model_of_fewer_ids_takes_the_first_rows(tmp_path):
    directory = write(tmp_path, LLAMA, {})
    whole = HfModel(directory, HfModel(directory).model.model_copy(update={"vocab_pad_multiple": 1}))
    fewer = HfModel(directory, whole.model.model_copy(update={"vocab_size": 5, "vocab_pad_multiple": 8}), 11)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert torch.equal(fewer.read(name), whole.read(name)[:8])
    for size in (5, 12):
        with pytest.raises(BadInput, match=r"has shape \[11, 16\], config.json says"):
            HfModel(directory, whole.model.model_copy(update={"vocab_size": size}))


@pytest.mark.parametrize(
    ("announced", "layer", "is_expected"), [(1, 2, True), (2, 3, True), (1, 3, False), (1, 21, False)]
)
def test_prediction_layers_are_those_that_are_announced(tmp_path, announced, layer, is_expected):
    config = DEEPSEEK | {"num_nextn_predict_layers": announced}
    write(tmp_path, config, {f"model.layers.{layer}.eh_proj.weight": torch.zeros(2)})
    if is_expected:
        assert len(HfModel(tmp_path).ignored) == 1
        return
    with pytest.raises(BadInput, match="has no place for"):
        HfModel(tmp_path)


def test_double_precision_is_not_called_quantised(tmp_path):
    write(tmp_path, LLAMA, {"model.norm.weight": torch.ones(16, dtype=torch.float64)})
    with pytest.raises(BadInput, match=r"model.norm.weight is float64; save it in one of bfloat16, float16, float32"):
        HfModel(tmp_path)
