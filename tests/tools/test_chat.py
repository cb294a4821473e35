"""Talking to a model: typed lines and files of prompts, on one rank and on tp2; what cannot be answered."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest

from tests.pool import Place


def run_chat(place: Place, argv: list[str], port: int, typed: str) -> tuple[int, str, str]:
    """Run the command as one rank of a launcher; return its exit code, its answers and its errors."""
    import contextlib
    import io
    import os
    import sys
    from unittest.mock import patch

    from parallel.environment import Environment
    from tools.chat import main

    variables = {}
    if place.world_size > 1:
        environment = Environment(rank=place.rank, world_size=place.world_size, master_port=port)
        variables = environment.as_variables()
    said, told = io.StringIO(), io.StringIO()
    with (
        patch.dict(os.environ, variables),
        patch.object(sys, "stdin", io.StringIO(typed)),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(told),
    ):
        code = main(argv)
    return int(code), said.getvalue(), told.getvalue()


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer_directory) -> Path:
    """Return a Hugging Face directory of random weights, with a tokenizer that has no chat template."""
    import torch
    import transformers

    directory = tmp_path_factory.mktemp("chat") / "model"
    config = transformers.LlamaConfig(
        vocab_size=340, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    for file in Path(tokenizer_directory).iterdir():
        shutil.copy(file, directory)
    return directory


@pytest.fixture
def chat(ranks, model):
    def run(*words: object, world: int = 1, typed: str = "") -> list[tuple[int, str, str]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        argv = [str(model), "--max-new-tokens", "12", *map(str, words)]
        return ranks.run(run_chat, argv, port, typed, world=world)

    return run


def test_a_file_is_answered_alike_on_any_layout(chat, tmp_path):
    rows = [{"prompt": "def add", "id": 7}, {"messages": [{"role": "user", "content": "naïve"}]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = ["--template", "alpaca", "--system", "Be brief.", "--prompts", tmp_path / "rows.jsonl", "--seed", "3"]
    ((code, said, told),) = chat(*words)
    assert code == 0, told
    answers = [json.loads(line) for line in said.splitlines()]
    assert [{key: one[key] for key in row} for one, row in zip(answers, rows, strict=True)] == rows
    assert all(one["answer"] and one["finish"] == "length" and one["num_tokens"] == 12 for one in answers)
    first, second = chat("parallel.tp=2", *words, "--out", tmp_path / "answers.jsonl", world=2)
    assert (first[0], second[0], second[1]) == (0, 0, ""), (first, second)
    assert (tmp_path / "answers.jsonl").read_text(encoding="utf-8") == said


def test_an_answer_behind_the_question_is_what_is_expected_of_it(chat, tmp_path):
    ask, turn = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
    called = {**turn, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]}
    rows = [{"messages": [ask]}, {"messages": [ask, turn], "answer": "4"}, {"messages": [ask, called]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    ((code, said, told),) = chat("--template", "alpaca", "--prompts", tmp_path / "rows.jsonl", "--temperature", "0")
    assert code == 0, told
    asked, expected, whole = [json.loads(line) for line in said.splitlines()]
    assert "expected" not in asked and (expected["expected"], whole["expected"]) == ("4", called)
    assert asked["answer"] == expected["answer"] == whole["answer"]
    assert expected["original_answer"] == "4" and expected["messages"] == [ask, turn]


ASK, TURN, ADD = {"role": "user", "content": "2?"}, {"role": "assistant", "content": "4"}, {"name": "add"}
THOUGHT = TURN | {"reasoning_content": "2"}


@pytest.mark.parametrize(
    ("suffix", "row", "expected"),
    [
        (".jsonl", {"conversations": [{"from": "human", "value": "2?"}, {"from": "gpt", "value": "4"}]}, "4"),
        (".json", {"instruction": "2?", "input": "", "output": "4"}, "4"),
        (".json", {"instruction": "2?", "output": ""}, None),
        (".parquet", {"instruction": "2?", "output": "4"}, "4"),
        (".parquet", {"messages": [ASK, TURN]}, "4"),
        (".jsonl", {"prompt": "2?", "completion": "4"}, "4"),
        (".jsonl", {"prompt": [ASK], "completion": [THOUGHT]}, THOUGHT),
        (".jsonl", {"prompt": [ASK]}, None),
        (".jsonl", {"prompt": "2?", "chosen": "4", "rejected": "5"}, None),
        (".jsonl", {"messages": [ASK], "system": "Be brief.", "tools": [ADD]}, None),
    ],
)  # fmt: skip
def test_a_file_of_any_form_of_fine_tuning_is_asked(tmp_path, suffix, row, expected):
    from tools.chat import _parse, _read_questions

    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    else:
        path.write_text(json.dumps([row] if suffix == ".json" else row))
    (question,) = _read_questions(path, _parse(["model", "--prompts", str(path), "--system", "S"]))
    assert [(one.role, one.content) for one in question.messages] == [
        ("system", row.get("system", "S")), ("user", "2?")
    ]  # fmt: skip
    assert (question.expected, question.row) == (expected, row)
    assert len(question.tools) == len(row.get("tools", ()))


def test_a_run_is_asked_with_the_template_it_was_tuned_with(monkeypatch, tmp_path):
    import trainer.checkpoint.layout
    import trainer.checkpoint.manifest
    from tools.open_model import read_template_of

    assert read_template_of(tmp_path) is None
    saved: dict[str, dict] = {}
    manifest = trainer.checkpoint.manifest.Manifest(1, {}, {}, {}, saved, {}, {})
    monkeypatch.setattr(trainer.checkpoint.layout, "resolve_checkpoint", lambda place: place)
    monkeypatch.setattr(trainer.checkpoint.manifest, "read_manifest", lambda place: manifest)
    for stage in ("sft", "grpo"):
        saved[stage] = {"template": "chatml"}
        assert read_template_of(tmp_path) == "chatml"
        del saved[stage]
    assert read_template_of(tmp_path) is None


def test_typed_lines_are_answered_and_forgotten_on_demand(chat):
    words = ["--template", "alpaca", "--temperature", "0"]
    ((_, twice, _),) = chat(*words, typed="return\n/new\n\nreturn\n")
    ((_, followed, _),) = chat(*words, typed="return\nreturn\n")
    ((_, once, _),) = chat(*words, typed="return\n")
    assert once and twice == once * 2
    assert followed.startswith(once) and followed != twice
    ((_, raw, _),) = chat("--raw", "--temperature", "0", typed="return\n")
    assert raw and raw != once


@pytest.mark.parametrize(
    "name, text, sentence",
    [
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": \n', "error: --prompts: input {path}:2: not valid JSON ("),
        (
            "a.json",
            '[{"question": "x"}]',
            "instruction; call yours prompt, or name it in a recipe: columns: {prompt: question}",
        ),
        ("a.jsonl", '{"messages": [{"role": "assistant", "content": "x"}]}\n', "holds no turn to answer; end with"),
        ("a.jsonl", '{"prompt": " ", "completion": "x"}\n', "the user's, is empty and asks nothing; drop the row"),
        ("a.txt", "\n", "a.txt: holds no prompts"),
    ],
)
def test_a_bad_file_is_one_sentence(chat, tmp_path, name, text, sentence):
    (tmp_path / name).write_text(text, encoding="utf-8")
    ((code, said, told),) = chat("--template", "alpaca", "--prompts", tmp_path / name)
    assert (code, said) == (2, "")
    sentence = sentence.format(path=tmp_path / name) if "{path}" in sentence else sentence
    assert told.startswith("error: ") and sentence in told and told.count("\n") == 1


def test_a_file_of_prompts_is_not_written_over(chat, tmp_path):
    (tmp_path / "a.txt").write_text("x\n")
    ((code, _, told),) = chat("--template", "alpaca", "--prompts", tmp_path / "a.txt", "--out", tmp_path / "a.txt")
    assert code == 2 and "a.txt: is what --prompts reads; a value that would work: answers.jsonl" in told
    assert (tmp_path / "a.txt").read_text() == "x\n"


def test_a_tokenizer_without_a_template_says_what_would_work(chat):
    ((code, _, told),) = chat(typed="hello\n")
    assert code == 2
    assert "--template" in told and "chatml" in told and "--raw" in told
