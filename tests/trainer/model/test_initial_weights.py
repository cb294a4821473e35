"""Initial weights: their standard deviation by kind, and that no two shards on any ranks are drawn alike.

Parity tests begin from one checkpoint on every layout, so they cannot see what a layout draws.
"""

from __future__ import annotations

import math
from typing import Any

import pytest

from configs.stages import Config
from tests.pool import Place
from tests.small_runs import open_engine, small_config

EXPERTS = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 96, "num_dense_layers": 1}
LATENT = {"q_lora_rank": 48, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"linear_bias": True, "tie_embeddings": True},
    "latent_experts": {
        "num_query_groups": None,
        "rope": {"interleaved": True},
        "mla": LATENT,
        "moe": EXPERTS | {"shared_expert_ffn_hidden_size": 96},
    },
}
STD = 0.03


def measure(place: Place, config: Config) -> dict[str, tuple[tuple[int, ...], float, float]]:
    """Return of each weight its shape, mean and standard deviation."""
    with open_engine(place, config) as engine:
        named = [(name, one.detach().double()) for name, one in engine.chunks[0].named_parameters()]
        return {name: (tuple(one.shape), float(one.mean()), float(one.std(correction=0))) for name, one in named}


@pytest.mark.parametrize("name", MODELS)
def test_initial_weights_have_the_standard_deviation_of_their_kind(ranks, name):
    """Radford et al. 2019 (GPT-2, section 2.3): projections back into the residual stream by 1 / sqrt(2 layers)."""
    config = small_config(model=MODELS[name] | {"init_std": STD})
    (found,) = ranks.run(measure, config)
    for weight, (shape, mean, std) in found.items():
        if len(shape) == 1:
            assert (mean, std) == (0.0 if weight.endswith("bias") else 1.0, 0.0), weight
            continue
        is_back = "linear_proj" in weight or "linear_fc2" in weight
        expected = STD / math.sqrt(2 * config.model.num_layers) if is_back else STD
        spread = 5 / math.sqrt(2 * math.prod(shape))  # five standard errors
        assert std == pytest.approx(expected, rel=spread) and abs(mean) < 2 * spread * expected, weight
    assert len(found) > 20


def beginnings(place: Place, config: Config) -> list[tuple[str, list[float]]]:
    """Return the first values of each matrix of this rank's that no other rank holds."""
    with open_engine(place, config) as engine:
        is_counted = {0: lambda one: one.tensor_model_parallel, 1: lambda one: not getattr(one, "allreduce", True)}
        counted = is_counted[engine.mesh.ep_size > 1]
        named = [item for chunk in engine.chunks for item in chunk.named_parameters()]
        return [(name, one.flatten()[:8].tolist()) for name, one in named if one.dim() > 1 and counted(one)]


@pytest.mark.parametrize(
    "parallel, model, count",
    [({"tp": 2, "pp": 2}, {}, 36), ({"pp": 2, "ep": 2}, {"moe": EXPERTS | {"num_dense_layers": 0}}, 32)],
    ids=["tp2_pp2", "pp2_ep2"],
)
def test_no_two_ranks_draw_the_same_weights(ranks, parallel, model, count):
    per_rank = ranks.run(beginnings, small_config(4, model=model, parallel=parallel), world=4)
    drawn = [(rank, name, values) for rank, found in enumerate(per_rank) for name, values in found]
    first = {str(values): (rank, name) for rank, name, values in reversed(drawn)}
    alike = [(first[str(values)], (rank, name)) for rank, name, values in drawn if first[str(values)] != (rank, name)]
    assert not alike
    assert len(drawn) == count
