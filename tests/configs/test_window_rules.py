"""Rules of sliding windows and attention sinks: one sentence each, with the field and a value that works."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.context_parallel import resolve_cp_attention, uses_te_attention
from configs.load import load_config
from configs.plan.derive import layer_windows
from configs.rules.check import check_config
from configs.stages import Config

TINY = Path(__file__).parents[2] / "configs" / "models" / "tiny.yaml"
RUN = ["data.train=[{path: a}]", "train.num_steps=100", "train.seq_len=64", "train.global_batch_size=16"]


def config_of(*overrides: str) -> Config:
    return load_config(str(TINY), [*RUN, *overrides])


def problems_of(*overrides: str, has_te: bool = False) -> list[str]:
    config = config_of(*overrides)
    return check_config(config, config.parallel.cp, platform="cuda", has_te=has_te)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["model.window_pattern=[true,false]"],
            "model.window_pattern: has no effect without model.window_size; a value that would work: [true]",
        ),
        (
            ["model.window_size=9", "model.window_pattern=[false]"],
            "model.window_pattern: gives no layer the window; a value that would work: [true]",
        ),
        (
            ["model.window_size=9", "model.window_pattern=[true,true,false,true,true]"],
            "model.window_pattern: has 5 entries for model.num_layers=4; a value that would work: "
            "[true, true, false, true]",
        ),
        (
            ["model.window_size=2048"],
            "model.window_size: 2048 hides nothing within model.max_position_embeddings=2048; a value that would work: "
            "null",
        ),
        (
            ["model.window_size=9", "model.attention_dropout=0.1"],
            "model.attention_dropout: is not drawn with model.window_size; a value that would work: 0.0",
        ),
        (
            ["model.attention_sinks=true", "model.attention_dropout=0.1"],
            "model.attention_dropout: is not drawn with model.attention_sinks; a value that would work: 0.0",
        ),
    ],
)
def test_each_rule_gives_its_sentence(overrides: list[str], sentence: str) -> None:
    assert problems_of(*overrides) == [sentence]


def test_the_pattern_repeats_over_the_layers() -> None:
    overrides = ["model.window_size=9", "model.window_pattern=[true,true,false]"]
    assert problems_of(*overrides) == []
    assert layer_windows(config_of(*overrides).model) == (9, 9, None, 9)
    assert layer_windows(config_of().model) == (None,) * 4


@pytest.mark.parametrize("method", ["ring", "all_gather", "ulysses"])
def test_every_method_of_ours_has_windows_and_sinks(method: str) -> None:
    fields = ["model.window_size=16", "model.attention_sinks=true", "parallel.cp=2"]
    assert problems_of(*fields, f"parallel.cp_attention={method}") == []


@pytest.mark.parametrize("field", ["window_size=16", "attention_sinks=true"])
def test_windows_and_sinks_are_not_for_the_ring_of_transformer_engine(field: str) -> None:
    shared, name = [f"model.{field}", "parallel.cp=4"], field.split("=")[0]
    assert problems_of(*shared, has_te=True) == []
    assert problems_of(*shared, "parallel.cp_attention=te", has_te=True) == [
        f"parallel.cp_attention: te cannot do model.{name}; a value that would work: ring"
    ]
    assert resolve_cp_attention(config_of(*shared), has_te=True) == "ring"
    assert not uses_te_attention(config_of(*shared), use_te=True)


def test_the_attention_of_transformer_engine_has_windows_and_no_sinks() -> None:
    window, sinks = config_of("model.window_size=16"), config_of("model.attention_sinks=true")
    assert uses_te_attention(window, use_te=True) and not uses_te_attention(sinks, use_te=True)
    assert not uses_te_attention(window, use_te=False)
