"""Rules of the rotation: what a scaling kind cannot do, and fields that it would leave unread."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.load import load_config
from configs.rules.model import check_model
from configs.sections.model import ModelConfig

TINY = Path(__file__).parents[2] / "configs" / "models" / "tiny.yaml"
LATENT = "model.mla={kv_lora_rank: 32, qk_nope_head_dim: 16, qk_rope_head_dim: 8, v_head_dim: 16}"
STRETCHED = "factor: 2, original_max_position_embeddings: 512"


def model_of(rope: str, *overrides: str) -> ModelConfig:
    return load_config(str(TINY), ["train.num_steps=0", f"model.rope={{{rope}}}", *overrides]).model


@pytest.mark.parametrize(
    ("rope", "problem"),
    [
        (
            "scaling: dynamic, factor: 2",
            "model.rope.original_max_position_embeddings: 4096 exceeds model.max_position_embeddings=2048; a value "
            "that would work: 2048",
        ),
        (
            "scaling: dynamic, factor: 1, original_max_position_embeddings: 512",
            "model.rope.factor: 1 extends nothing; a value that would work: 8.0",
        ),
        (
            "scaling: dynamic, factor: 0.5, original_max_position_embeddings: 512",
            "model.rope.factor: 0.5 extends nothing; a value that would work: 8.0",
        ),
        (
            f"scaling: dynamic, {STRETCHED}, fraction: 0.03125",
            "model.rope.scaling: dynamic stretches what lies between the first and the last of the rotated pairs, here "
            "is one; values that would work: none, linear, llama3, yarn",
        ),
        (
            f"scaling: dynamic, {STRETCHED}, attention_factor: 1.1",
            "model.rope.attention_factor: has no effect with model.rope.scaling=dynamic; a value that would work: null",
        ),
        (
            f"scaling: linear, {STRETCHED}",
            "model.rope.original_max_position_embeddings: has no effect with model.rope.scaling=linear; a value that "
            "would work: 4096",
        ),
        (
            "scaling: linear, factor: 2, truncate: false",
            "model.rope.truncate: has no effect with model.rope.scaling=linear; a value that would work: true",
        ),
        (
            f"scaling: yarn, {STRETCHED}, fraction: 0.5",
            "model.rope.fraction: yarn rotates whole heads; a value that would work: 1.0",
        ),
        (
            f"scaling: yarn, {STRETCHED}, attention_factor: 1.1, mscale: 2",
            "model.rope.mscale: has no effect with model.rope.attention_factor; a value that would work: 1.0",
        ),
        (
            f"scaling: yarn, {STRETCHED}, attention_factor: 1.1, mscale_all_dim: 2",
            "model.rope.mscale_all_dim: has no effect with model.rope.attention_factor; a value that would work: 0.0",
        ),
    ],
)
def test_a_rotation_that_cannot_be_is_refused(rope, problem):
    assert check_model(model_of(rope)) == [problem]


def test_latent_attention_takes_yarn_alone_with_a_factor_on_its_softmax():
    latent = (LATENT, "model.num_query_groups=null")
    (problem,) = check_model(model_of(f"scaling: dynamic, interleaved: true, {STRETCHED}", *latent))
    assert problem == "model.rope.scaling: latent attention has no dynamic; values that would work: none, yarn"
    rope = f"scaling: yarn, interleaved: true, {STRETCHED}, attention_factor: 1.1, mscale_all_dim: 2"
    assert check_model(model_of(rope, *latent)) == []


@pytest.mark.parametrize("scaling", ["dynamic", "llama3", "yarn"])
def test_every_kind_that_reads_the_original_length_takes_it(scaling):
    assert check_model(model_of(f"scaling: {scaling}, {STRETCHED}")) == []
