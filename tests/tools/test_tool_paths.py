"""Paths of the tools' command lines: one sentence for what can be none, for every tool and every path it takes."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from tools.paths import path_argument

LONG = "x" * 300
COMMANDS = {
    "compare_runs": ["RUN", "b"],
    "convert_hf": ["import", "RUN", "b"],
    "convert_hf ": ["export", "a", "RUN"],
    "convert_hf  ": ["verify", "a", "RUN"],
    "convert_hf   ": ["model", "RUN"],
    "gpu_check": ["--out", "RUN"],
    "inspect_checkpoint": ["RUN"],
    "prepare_corpus": ["--out", "RUN"],
    "preprocess_data": ["RUN", "--tokenizer", "t", "--out", "o"],
    "preprocess_data ": ["a", "--tokenizer", "RUN", "--out", "o"],
    "preprocess_data  ": ["a", "--tokenizer", "t", "--out", "RUN"],
    "train_tokenizer": ["a", "--out", "RUN", "--vocab-size", "300"],
    "train_tokenizer ": ["RUN", "--out", "o", "--vocab-size", "300"],
}


@pytest.mark.parametrize("tool", COMMANDS)
@pytest.mark.parametrize(("path", "words"), [(LONG, "has a name of 300 bytes"), ("", "is empty"), ("a\udcff", "UTF-8")])
def test_what_can_be_no_path_is_told_by_every_tool(tool, path, words, capsys):
    words_typed = [path if word == "RUN" else word for word in COMMANDS[tool]]
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"tools.{tool.strip()}").main(words_typed)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_home_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/a/home")
    assert path_argument("~/x") == Path("/a/home/x")


def test_no_tool_takes_a_path_otherwise():
    tools = list((Path(__file__).parents[2] / "tools").rglob("*.py"))
    assert len(tools) > 20
    assert not [tool.name for tool in tools if "type=Path" in tool.read_text(encoding="utf-8")]
