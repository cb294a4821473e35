"""Rules of single stages."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.load import load_config
from configs.rules.check import check_config

RECIPE = str(Path(__file__).parents[2] / "configs" / "demo" / "long_context.yaml")


@pytest.mark.parametrize(
    ("words", "is_refused"),
    [
        ([], False),
        (["checkpoint.init_from=null"], True),
        (["checkpoint.init_from=null", "checkpoint.init_from_hf=llama"], False),
        (["checkpoint.init_from=null", "checkpoint.resume=runs/long"], False),
    ],
)
def test_long_context_begins_with_weights(words: list[str], is_refused: bool) -> None:
    problems = check_config(load_config(RECIPE, words, "long_context"), 2, platform="cpu", has_te=False)
    assert [one.split(":")[0] for one in problems] == ["checkpoint.init_from"] * is_refused
