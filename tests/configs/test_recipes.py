"""The recipes for clusters: each breaks no rule on the ranks that its first lines name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from configs.load import load_config
from configs.rules.check import check_config
from configs.stages import STAGE_CONFIGS

ROOT = Path(__file__).parents[2] / "configs"
RECIPES = sorted(path for stage in STAGE_CONFIGS for path in (ROOT / stage).glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_run_at_the_world_size_their_comment_states(path: Path) -> None:
    comment, stage = path.read_text(encoding="utf-8"), path.parent.name
    line = rf"torchrun --nnodes (\d+) --nproc-per-node (\d+) .*launch/{stage}.py configs/{stage}/(\S+)"
    command = re.search(line, comment)
    assert command is not None and command[3] == path.name
    config = load_config(str(path), (), stage)
    needs_te = config.precision.fp8 is not None and config.precision.fp8.backend == "te"
    assert check_config(config, int(command[1]) * int(command[2]), platform="cuda", has_te=needs_te) == []
    assert config.run.name == path.stem


def test_there_are_recipes_to_check() -> None:
    assert {path.stem for path in RECIPES} >= {"llama3_1_8b", "llama3_1_70b", "llama3_1_8b_512k", "qwen3_30b_a3b_32k"}
