"""The table of linears (`configs.plan.tensors`) against the models that are built: names, shapes, splits, biases."""

from __future__ import annotations

import re
from typing import Any

import pytest

from configs.plan.tensors import layer_linears
from configs.stages import Config
from tests.pool import Place
from tests.small_runs import open_engine, small_config

ROUTED = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 48, "num_dense_layers": 1}
LATENT = {"kv_lora_rank": 24, "q_lora_rank": 40, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "biased": {"linear_bias": True, "activation": "gelu"},
    "qkv_bias": {"qkv_bias": True, "activation": "geglu"},
    "experts": {"moe": ROUTED | {"shared_expert_ffn_hidden_size": 72}},
    "latent": {"mla": LATENT, "num_query_groups": None, "rope": {"interleaved": True}},
    "latent_query_whole": {
        "mla": LATENT | {"q_lora_rank": None},
        "num_query_groups": None,
        "rope": {"interleaved": True},
    },
}


def find_shapes(place: Place, config: Config) -> dict[tuple[int, str], tuple[Any, ...]]:
    """Return the shapes of weight and bias of each linear of this rank, and how many experts hold one, by place."""
    found: dict[tuple[int, str], tuple[Any, ...]] = {}
    with open_engine(place, config) as engine:
        for layer in engine.chunks[0].decoder.layers:
            for name, parameter in layer.named_parameters():
                if parameter.dim() != 2:
                    continue
                module = layer.get_submodule(name.rpartition(".")[0])
                linear = re.sub(r"\.local_experts\.\d+\.", ".", name.removesuffix(".weight"))
                bias = getattr(module, "bias", None)
                key = (layer.layer_number - 1, linear)
                held = found.get(key, (None, None, 0))[2]
                found[key] = (tuple(parameter.shape), None if bias is None else tuple(bias.shape), held + 1)
    return found


def expected_shapes(config: Config, tp: int) -> dict[tuple[int, str], tuple[Any, ...]]:
    """Return what the table says of a rank with all experts."""
    expected = {}
    for layer in range(config.model.num_layers):
        for linear in layer_linears(config.model, layer):
            output = linear.output.total // (tp if linear.split in ("column", "gathered") else 1)
            width = linear.input.total // (tp if linear.split == "row" else 1)
            bias = (output,) if linear.has_bias else None
            expected[layer, linear.name] = ((output, width), bias, linear.num_experts or 1)
    return expected


@pytest.mark.parametrize("tp", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MODELS)
def test_the_table_is_what_is_built(ranks, name, tp):
    parallel = {"tp": tp, "sp": tp > 1}
    config = small_config(tp, model=MODELS[name], parallel=parallel)
    for found in ranks.run(find_shapes, config, world=tp):
        assert found == expected_shapes(config, tp)
