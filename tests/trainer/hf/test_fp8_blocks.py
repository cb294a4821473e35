"""FP8 weights by blocks are read as an independent statement in fp64 says, and as transformers dequantises them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.errors import BadInput
from trainer.hf.config_json import read_model
from trainer.hf.families import FAMILIES
from trainer.hf.fp8_blocks import dequantise, num_blocks
from trainer.hf.source import HfModel
from trainer.hf.tensors import model_rules

QUANTISED = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
# Most sides are no multiples of 16, as DeepSeek-V3's 576 rows of kv_a_proj_with_mqa are none of 128.
CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 11, "hidden_size": 40,
    "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 2, "n_routed_experts": 2,
    "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    "n_shared_experts": 1, "q_lora_rank": 20, "kv_lora_rank": 18, "qk_nope_head_dim": 10, "qk_rope_head_dim": 4,
    "v_head_dim": 8, "num_nextn_predict_layers": 1, "torch_dtype": "bfloat16", "quantization_config": QUANTISED,
}  # fmt: skip


def quantise(weight: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float8 and scales, block by block."""
    rows, columns = num_blocks(tuple(weight.shape), (block, block))
    scales, small = torch.empty(rows, columns), torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for row in range(rows):
        for column in range(columns):
            here = slice(row * block, (row + 1) * block), slice(column * block, (column + 1) * block)
            scales[row, column] = weight[here].abs().max() / 448
            small[here] = (weight[here] / scales[row, column]).to(torch.float8_e4m3fn)
    return small, scales


def by_fp64(weight: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Return each element times the scale of its block, exactly."""
    rows, columns = (torch.arange(side) // size for side, size in zip(weight.shape, block, strict=True))
    return weight.double() * scales.double()[rows][:, columns]


@pytest.mark.parametrize("shape", [(256, 384), (130, 257), (1, 5), (127, 128), (576, 300)])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_the_product_is_exact_to_its_number_format(shape, scale_dtype):
    torch.manual_seed(3)
    weight = (torch.randn(shape) * 60).to(torch.float8_e4m3fn)
    scales = (torch.rand(num_blocks(shape, (128, 128))) * 1e-3 + 1e-5).to(scale_dtype)
    exact = by_fp64(weight, scales, (128, 128))
    assert torch.equal(dequantise(weight, scales, (128, 128), torch.float32), exact.float())
    assert torch.equal(dequantise(weight, scales, (128, 128), torch.bfloat16), exact.float().bfloat16())


@pytest.mark.slow
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_transformers_dequantises_the_same(scale_dtype):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    torch.manual_seed(4)
    weight, scales = (torch.randn(256, 384) * 60).to(torch.float8_e4m3fn), torch.rand(2, 3).to(scale_dtype)
    theirs = Fp8Dequantize(None)._dequantize_one(weight, scales, torch.bfloat16)
    assert torch.equal(dequantise(weight, scales, (128, 128), torch.bfloat16), theirs)


def write_quantised(directory: Path) -> dict[str, torch.Tensor]:
    """Write a model as DeepSeek-V3 is published, prediction layer included; return its tensors in full precision."""
    torch.manual_seed(5)
    parts = [
        part for rule in model_rules(read_model(CONFIG), FAMILIES[CONFIG["architectures"][0]].names) for part in rule.hf
    ]
    stored, full = {}, {}
    for part in parts:
        stored[part.name] = full[part.name] = torch.randn(part.shape).bfloat16()
        if part.name.endswith("_proj.weight") or "kv_a_proj" in part.name:
            small, scales = quantise(torch.randn(part.shape), 16)
            stored[part.name], stored[part.name + "_scale_inv"] = small, scales
            full[part.name] = by_fp64(small, scales, (16, 16)).float().bfloat16()
    for name, tensor in (("weight", small), ("weight_scale_inv", scales)):
        stored[f"model.layers.2.eh_proj.{name}"] = tensor.clone()
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return full


def test_a_quantised_model_is_read_as_the_model_that_it_stands_for(tmp_path):
    (tmp_path / "fp8").mkdir()
    (tmp_path / "bf16").mkdir()
    full = write_quantised(tmp_path / "fp8")
    save_file(full, tmp_path / "bf16" / "model.safetensors", metadata={"format": "pt"})
    plain = {key: value for key, value in CONFIG.items() if key != "quantization_config"}
    (tmp_path / "bf16" / "config.json").write_text(json.dumps(plain))
    quantised, expected = HfModel(tmp_path / "fp8"), HfModel(tmp_path / "bf16")
    assert quantised.dtype == torch.bfloat16 and len(quantised.ignored) == 2
    for name in expected.rules:
        assert torch.equal(quantised.read(name), expected.read(name)), name


def spoil(directory: Path, how: str) -> None:
    """Spoil the quantised model."""
    tensors, config = load_file(directory / "model.safetensors"), dict(CONFIG)
    name = "model.layers.0.mlp.up_proj.weight"
    if how == "no scales":
        del tensors[name + "_scale_inv"]
    elif how == "other blocks":
        config["quantization_config"] = QUANTISED | {"weight_block_size": [32, 32]}
    elif how == "no blocks":
        config["quantization_config"] = QUANTISED | {"weight_block_size": None}
    elif how == "no word":
        del config["quantization_config"]
    elif how == "static":
        config["quantization_config"] = QUANTISED | {"activation_scheme": "static"}
    elif how == "gptq":
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    elif how == "int8":
        tensors[name] = tensors[name].float().to(torch.int8)
    elif how == "double":
        tensors["model.norm.weight"] = tensors["model.norm.weight"].double()
    elif how == "not quantised":
        tensors = {key: value.bfloat16() for key, value in tensors.items() if not key.endswith("_scale_inv")}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (
            "no scales",
            "up_proj.weight is float8_e4m3fn; such quantised weights cannot be converted, only float8 with",
        ),
        ("other blocks", "blocks of [32, 32] need floating point of shape"),
        ("no blocks", "quantization_config.weight_block_size: None cannot be converted, only such as [128, 128]"),
        ("no word", "and quantization_config.weight_block_size in config.json"),
        ("static", "quantization_config.activation_scheme: 'static' cannot be converted, only 'dynamic'"),
        ("gptq", "quantization_config.quant_method: 'gptq' cannot be converted, only 'fp8'"),
        ("int8", "up_proj.weight is int8; such quantised weights cannot be converted"),
        ("double", "model.norm.weight is float64; save it in one of bfloat16, float16, float32"),
        ("not quantised", "quantization_config is given, but no tensor is quantised; remove it"),
    ],
)
def test_other_quantised_weights_are_refused_by_name(tmp_path, how, expected):
    write_quantised(tmp_path)
    spoil(tmp_path, how)
    with pytest.raises(BadInput) as caught:
        HfModel(tmp_path)
    assert expected in str(caught.value) and "\n" not in str(caught.value)
