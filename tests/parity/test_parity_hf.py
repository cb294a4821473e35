"""Hugging Face in and out, for every family: logits as in `transformers` on sharded layouts, tensors bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.sections.model import ModelConfig
from configs.stages import RewardModelConfig
from tests.pool import Place
from tests.small_runs import build_stage, open_engine, save_checkpoint, small_config

SHARED: dict[str, Any] = {
    "vocab_size": 251, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.06, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}  # fmt: skip
LATENT: dict[str, Any] = {
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "n_routed_experts": 4, "moe_intermediate_size": 32,
    "n_shared_experts": 2, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
TP2_PP2 = (4, {"tp": 2, "pp": 2})
CP2_TP2 = (4, {"cp": 2, "tp": 2})
EP2 = (2, {"ep": 2})
EP2_TP2 = (4, {"ep": 2, "tp": 2, "sp": True})
# name -> class of transformers, changes to SHARED, layout
CASES: dict[str, tuple[str, dict[str, Any], tuple[int, dict[str, Any]]]] = {
    "llama": ("Llama", {}, TP2_PP2),
    "llama_tied_scaled": ("Llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}, TP2_PP2),
    "llama_mha_biased": ("Llama", {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}, TP2_PP2),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 24}, TP2_PP2),
    "mistral_window": ("Mistral", {"sliding_window": 7}, CP2_TP2),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}, TP2_PP2),
    "qwen2_yarn": ("Qwen2", {"rope_parameters": YARN}, TP2_PP2),
    "qwen2_window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3}, TP2_PP2),
    "qwen3": ("Qwen3", {"head_dim": 32}, TP2_PP2),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": 9}, EP2),
    "qwen3_moe": (
        "Qwen3Moe",
        {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2, "norm_topk_prob": True,
         "head_dim": 32},
        EP2_TP2,
    ),
    "qwen3_moe_unnormalised": (
        "Qwen3Moe",
        {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2, "mlp_only_layers": [0]},
        EP2,
    ),
    "deepseek_v2": ("DeepseekV2", LATENT | {"routed_scaling_factor": 1.0}, EP2),
    "deepseek_v2_lite": ("DeepseekV2", LATENT | {"q_lora_rank": None, "n_group": 1, "topk_group": 1}, EP2),
    "deepseek_v3": ("DeepseekV3", LATENT | {"n_group": 2, "topk_group": 1}, EP2_TP2),
    "deepseek_v3_yarn": (
        "DeepseekV3",
        LATENT | {"n_group": 1, "topk_group": 1, "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
        EP2,
    ),
    # The norms of the latents keep 1e-6, which a large epsilon of the others shows.
    "moonlight": (
        "DeepseekV3", LATENT | {"n_group": 1, "topk_group": 1, "q_lora_rank": None, "rms_norm_eps": 0.1}, EP2,
    ),
    "kimi_k2": (
        "DeepseekV3",
        LATENT | {"n_group": 1, "topk_group": 1, "rms_norm_eps": 0.1, "num_mtp_layers": 0,
                  "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 1.0, "beta_slow": 1.0}},
        EP2_TP2,
    ),
}  # fmt: skip


def make_hf_model(directory: Path, name: str, head: str = "ForCausalLM", **further: Any) -> None:
    """Write a small random model of a family, with weights that differ everywhere (norms and biases too)."""
    import torch
    import transformers

    kind, changes, _ = CASES[name]
    config = getattr(transformers, f"{kind}Config")(**(SHARED | changes | further))
    torch.manual_seed(7)
    model = getattr(transformers, kind + head)(config)
    with torch.no_grad():
        for tensor in [*model.parameters(), *(buffer for key, buffer in model.named_buffers() if "bias" in key)]:
            spread = 0.3 if tensor.dim() == 1 else 0.06
            tensor.copy_(torch.randn_like(tensor) * spread + (tensor.dim() == 1) * float(tensor.mean()))
    model.save_pretrained(directory)


def transformers_logits(directory: Path, tokens: np.ndarray) -> np.ndarray:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()


def start_and_export(
    place: Place, config: Any, source: str, imported: str | None, tokens: np.ndarray, run_dir: str, target: str
) -> np.ndarray:
    """Warm-start from a model directory (or its import), return the logits, save on this layout and export."""
    import torch

    from trainer.checkpoint.load import warm_start
    from trainer.engine.state import TrainState
    from trainer.hf.export_source import ExportSource
    from trainer.hf.exporting import export_checkpoint
    from trainer.hf.source import HfModel
    from trainer.hf.warm_start import load_hf_weights

    with open_engine(place, config) as engine:
        if imported is None:
            load_hf_weights(engine, HfModel(source, config.model))
        else:
            warm_start(engine, Path(imported) / "checkpoints" / "latest")
        logits = engine.compute_logits(torch.from_numpy(tokens)).numpy()
        save_checkpoint(engine, TrainState(), build_stage(engine), Path(run_dir))
        checkpoint = Path(run_dir) / "checkpoints" / "latest"
        export_checkpoint(
            ExportSource(checkpoint.resolve(), config.model, carried=Path(source)),
            Path(target),
            dtype=None,
            rank=place.rank,
            world_size=place.world_size,
            on_bytes=lambda done: None,
            max_file_bytes=100_000,
        )
    return logits


def read_tensors(directory: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def read_section(directory: Path) -> ModelConfig:
    from trainer.hf.config_json import load_config_json, read_model

    return read_model(load_config_json(directory))


@pytest.mark.parametrize("name", CASES)
def test_a_family_comes_in_and_goes_out(ranks, tmp_path, name):
    import torch

    world, layout = CASES[name][2]
    make_hf_model(tmp_path / "hf", name)
    model = read_section(tmp_path / "hf").model_dump()
    config = small_config(world, model=model | {"vocab_pad_multiple": 16}, parallel=layout | {"timeout_seconds": 60})
    tokens = np.random.default_rng(3).integers(0, 251, (2, 48))
    arguments = (str(tmp_path / "hf"), None, tokens, str(tmp_path / "run"), str(tmp_path / "out"))
    answers = ranks.run(start_and_export, config, *arguments, world=world)
    expected = transformers_logits(tmp_path / "hf", tokens)
    for logits in answers:
        np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)
    before, after = read_tensors(tmp_path / "hf"), read_tensors(tmp_path / "out")
    assert before.keys() == after.keys() and len(before) > 20
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype and torch.equal(tensor, after[key]), key
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(before)
    np.testing.assert_array_equal(transformers_logits(tmp_path / "out", tokens), expected)


REWARD_CASES = {
    "llama": (2, {"tp": 2, "sp": True}),
    "qwen2": (2, {"pp": 2}),  # tied
    "qwen3": (2, {"cp": 2}),
    "mixtral": EP2,
    "deepseek_v3": (2, {"tp": 2, "sp": True}),
}


def score_and_export(
    place: Place, config: Any, source: str, tokens: np.ndarray, run_dir: str, target: str
) -> np.ndarray:
    """Take in a sequence classifier, return the values of all tokens, save on this layout and export from there."""
    import torch

    from parallel.collectives import from_last_pp_stage
    from trainer.data.batch import Batch
    from trainer.engine.forward import forward_values
    from trainer.engine.state import TrainState
    from trainer.hf.export_source import describe_source
    from trainer.hf.exporting import export_checkpoint
    from trainer.hf.source import HfModel
    from trainer.hf.warm_start import load_hf_weights

    with open_engine(place, RewardModelConfig.model_validate(config.model_dump() | {"reward": {}})) as engine:
        load_hf_weights(engine, HfModel(source, config.model))
        ids = torch.from_numpy(tokens)
        positions = torch.arange(ids.shape[1]).expand(len(ids), -1).contiguous()
        found = engine.score([Batch(ids, ids, positions, torch.ones(ids.shape))], forward_values)
        values = from_last_pp_stage(found[0] if found else torch.empty(ids.shape), engine.mesh)
        stage = build_stage(engine)
        stage.name = "reward"
        save_checkpoint(engine, TrainState(), stage, Path(run_dir))
        export_checkpoint(
            describe_source((Path(run_dir) / "checkpoints" / "latest").resolve()),
            Path(target),
            dtype=None,
            rank=place.rank,
            world_size=place.world_size,
            on_bytes=lambda done: None,
        )
    return values.numpy()


def transformers_scores(directory: Path, tokens: np.ndarray, ends: list[int]) -> np.ndarray:
    """Return the scores `[rows, len(ends)]` of the beginnings of each row that end at these tokens."""
    import torch
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    assert model.config.num_labels == 1
    with torch.no_grad():
        scores = [[model(torch.from_numpy(row[None, : end + 1])).logits.item() for end in ends] for row in tokens]
    return np.array(scores)


@pytest.mark.parametrize("name", REWARD_CASES)
def test_a_reward_model_comes_in_and_goes_out(ranks, tmp_path, name):
    """A classifier of one label: `transformers` scores as we do, before and after, and every tensor is the same."""
    import torch

    world, layout = REWARD_CASES[name]
    make_hf_model(tmp_path / "hf", name, "ForSequenceClassification", num_labels=1)
    config = small_config(world, model=read_section(tmp_path / "hf").model_dump(), parallel=layout)
    tokens, ends = np.random.default_rng(3).integers(0, 251, (2, 48)), [0, 20, 47]
    arguments = (str(tmp_path / "hf"), tokens, str(tmp_path / "run"), str(tmp_path / "out"))
    found = ranks.run(score_and_export, config, *arguments, world=world)
    expected = transformers_scores(tmp_path / "hf", tokens, ends)
    assert np.ptp(expected) > 0.1
    for values in found:
        np.testing.assert_allclose(values[:, ends], expected, atol=1e-5 * np.abs(expected).max(), rtol=0)
    before, after = read_tensors(tmp_path / "hf"), read_tensors(tmp_path / "out")
    assert before.keys() == after.keys() and "score.weight" in before
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype and torch.equal(tensor, after[key]), key
    np.testing.assert_array_equal(transformers_scores(tmp_path / "out", tokens, ends), expected)
