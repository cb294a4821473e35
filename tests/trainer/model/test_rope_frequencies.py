"""Rotary frequencies of every scaling kind against those of `transformers`, as functions and as models use them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from configs.sections.model import RopeConfig
from tests.pool import Place
from tests.small_runs import open_engine, small_config

HEAD_DIM = 64
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "other_base": {"base": 500000.0},
    "part_rotated": {"fraction": 0.25},
    "linear": {"scaling": "linear", "factor": 4.0},
    "llama3": {
        "scaling": "llama3", "base": 500000.0, "factor": 8.0, "original_max_position_embeddings": 8192,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    },
    "llama3_2": {
        "scaling": "llama3", "base": 500000.0, "factor": 32.0, "original_max_position_embeddings": 8192,
    },
    "yarn": {"scaling": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
    "yarn_betas": {
        "scaling": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 16.0,
        "beta_slow": 2.0,
    },
    "yarn_mscale": {
        "scaling": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 0.707,
        "mscale_all_dim": 1.0,
    },
}  # fmt: skip


def transformers_frequencies(rope: RopeConfig) -> tuple[np.ndarray, float]:
    """Return the inverse frequencies and the factor on attention that `transformers` computes."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    kind = "default" if rope.scaling == "none" else rope.scaling
    parameters: dict[str, Any] = {"rope_type": kind, "rope_theta": rope.base, "partial_rotary_factor": rope.fraction}
    if kind != "default":
        parameters["factor"] = rope.factor
    if kind in ("llama3", "yarn"):
        parameters["original_max_position_embeddings"] = rope.original_max_position_embeddings
    names = {"llama3": ("low_freq_factor", "high_freq_factor"), "yarn": ("beta_fast", "beta_slow")}
    parameters |= {name: getattr(rope, name) for name in names.get(kind, ())}
    if rope.mscale_all_dim:
        parameters |= {"mscale": rope.mscale, "mscale_all_dim": rope.mscale_all_dim}
    config = LlamaConfig(
        head_dim=HEAD_DIM, hidden_size=4 * HEAD_DIM, num_attention_heads=4, rope_parameters=parameters,
        max_position_embeddings=int(rope.original_max_position_embeddings * rope.factor),
    )  # fmt: skip
    if kind == "default":
        config.head_dim = int(HEAD_DIM * rope.fraction)
        frequencies, factor = LlamaRotaryEmbedding(config).inv_freq, 1.0
    else:
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    return frequencies.numpy(), float(factor)


@pytest.mark.parametrize("name", [name for name in KINDS if not name.startswith("yarn")])
def test_frequencies_equal_transformers(name):
    from trainer.model.rope import compute_inverse_frequencies

    rope = RopeConfig(**KINDS[name])
    expected, _ = transformers_frequencies(rope)
    found = compute_inverse_frequencies(rope, HEAD_DIM).numpy()
    assert found.shape == (int(HEAD_DIM * rope.fraction) // 2,)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def model_angles(place: Place, config: Any, seq_len: int) -> tuple[np.ndarray, float]:
    """Return the angles `[seq, rotary_dim]` and the factor that the built model rotates by."""
    with open_engine(place, config) as engine:
        embedding = engine.chunks[0].rotary_pos_emb
        found = embedding(seq_len)
        angles, factor = found if isinstance(found, tuple) else (found, 1.0)
        return angles[:, 0, 0].numpy(), float(factor)


@pytest.mark.parametrize("name", KINDS)
def test_models_rotate_by_them(ranks, name):
    rope = RopeConfig(**KINDS[name])
    model = {
        "num_layers": 1, "hidden_size": 4 * HEAD_DIM, "num_query_groups": None, "rope": KINDS[name],
        "max_position_embeddings": 200000,
    }  # fmt: skip
    ((angles, factor),) = ranks.run(model_angles, small_config(model=model), 1000)
    expected, expected_factor = transformers_frequencies(rope)
    half = expected.shape[0]
    np.testing.assert_allclose(angles[:, :half], np.outer(np.arange(1000), expected), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(angles[:, half:], angles[:, :half])
    assert factor == pytest.approx(expected_factor, rel=1e-6)
