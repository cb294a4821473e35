"""What Megatron-Core is told of number formats: its own configs take it, for every FP8 recipe of Transformer Engine."""

from __future__ import annotations

import pytest

from tests.pool import Place

RECIPES = {
    "delayed": {"recipe": "delayed", "backend": "te", "param_gather": True, "amax_history_len": 7},
    "tensorwise": {"recipe": "tensorwise", "backend": "te", "num_first_layers_kept": 1, "num_last_layers_kept": 2},
    "blockwise": {"recipe": "blockwise", "backend": "te"},
    "mxfp8": {"recipe": "mxfp8", "backend": "te", "format": "hybrid"},
}


def build_configs(place: Place, fp8: dict) -> tuple[dict, dict, dict]:
    """Return the FP8 fields of Megatron-Core's model, optimizer and data-parallel configs, which check themselves."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    from configs.stages import Config
    from parallel.precision import gathers_fp8, model_precision, optimizer_precision

    model = {"num_layers": 8, "hidden_size": 64, "ffn_hidden_size": 64, "num_attention_heads": 4, "vocab_size": 100}
    config = Config.model_validate({"model": model, "train": {"num_steps": 1}, "precision": {"fp8": fp8}})
    sizes = {"num_layers": 8, "hidden_size": 64, "num_attention_heads": 4}
    transformer = TransformerConfig(**sizes, **model_precision(config, use_te=True))
    optimizer = OptimizerConfig(optimizer="adam", lr=1e-3, **optimizer_precision(config.precision))
    replicas = DistributedDataParallelConfig(fp8_param_gather=gathers_fp8(config.precision))
    assert not model_precision(config, use_te=False).get("fp8"), "the layers are not Transformer Engine's"
    return vars(transformer), {"fp8_recipe": optimizer.fp8_recipe}, {"gather": replicas.fp8_param_gather}


@pytest.mark.parametrize("name", RECIPES)
def test_transformer_engines_recipes_become_megatron_cores_options(ranks, name):
    transformer, optimizer, replicas = ranks.run(build_configs, RECIPES[name])[0]
    gathers = RECIPES[name].get("param_gather", False)
    assert (transformer["fp8_recipe"], transformer["bf16"]) == (name, True)
    assert (
        transformer["fp8"]
        == {"delayed": "hybrid", "tensorwise": "hybrid", "blockwise": "e4m3", "mxfp8": "hybrid"}[name]
    )
    assert transformer["fp8_param"] == replicas["gather"] == gathers
    if gathers:
        assert optimizer["fp8_recipe"] == name
    if name == "delayed":
        assert (transformer["fp8_amax_history_len"], transformer["fp8_amax_compute_algo"]) == (7, "max")
    if name == "tensorwise":
        kept = [transformer[f"num_layers_at_{end}_in_bf16"] for end in ("start", "end")]
        assert transformer["first_last_layers_bf16"] and kept == [1, 2]
