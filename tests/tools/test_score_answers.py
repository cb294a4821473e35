"""Answers scored by a reward model: as `transformers` scores them, on one rank and on pp2; what cannot score."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import socket
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.pool import Place

PAIRS = [
    {"prompt": "def add", "chosen": "return a + b", "rejected": "pass", "id": 7},
    {"prompt": "import", "chosen": "os " * 200, "rejected": "sys " * 200},
]
TALK = {"messages": [{"role": "user", "content": "def add"}, {"role": "assistant", "content": "return a + b"}]}


def run_tool(place: Place, argv: list[str], port: int) -> tuple[int, str, str]:
    """Run the command as one rank of a launcher; return its exit code, what it says and its errors."""
    from parallel.environment import Environment
    from tools.score_answers import main

    environment = Environment(rank=place.rank, world_size=place.world_size, master_port=port)
    variables = environment.as_variables() if place.world_size > 1 else {}
    said, told = io.StringIO(), io.StringIO()
    with (
        patch.dict(os.environ, variables),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(told),
    ):
        code = main(argv)
    return int(code), said.getvalue(), told.getvalue()


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer_directory) -> Path:
    """Return a folder with `reward` and `language`, of random weights."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("models")
    config = transformers.LlamaConfig(
        vocab_size=340, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2, num_labels=1,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForSequenceClassification(config).save_pretrained(folder / "reward")
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "language")
    for name in ("reward", "language"):
        for file in Path(tokenizer_directory).iterdir():
            shutil.copy(file, folder / name)
    return folder


@pytest.fixture
def score(ranks, models, tmp_path):
    def run(rows: list[dict], *words: object, world: int = 1, model: str = "reward") -> list[tuple[int, str, str]]:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        argv = [str(models / model), str(file), "--template", "alpaca", "--length", "200", *map(str, words)]
        return ranks.run(run_tool, argv, port, world=world)

    return run


def test_answers_are_scored_as_transformers_does_on_any_layout(score, models, tmp_path):
    import torch
    import transformers

    ((code, said, told),) = score(PAIRS)
    assert code == 0, told
    first, second = (json.loads(line) for line in said.splitlines())
    assert {key: first[key] for key in PAIRS[0]} == PAIRS[0]
    assert (second["chosen_reward"], second["left_out"]) == (None, "longer than train.seq_len")
    ((_, said, _),) = score([TALK])
    assert json.loads(said)["reward"] == pytest.approx(first["chosen_reward"], abs=1e-5)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(models / "reward")
    tokenizer = transformers.AutoTokenizer.from_pretrained(models / "reward")
    text = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    text += f"\n\n### Instruction:\ndef add\n\n### Response:\nreturn a + b{tokenizer.eos_token}"
    ids = tokenizer((tokenizer.bos_token or "") + text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        assert model(torch.tensor([ids])).logits.item() == pytest.approx(first["chosen_reward"], abs=1e-5)
    answers = score(PAIRS, "parallel.pp=2", "--out", tmp_path / "scored.jsonl", world=2)
    assert [code for code, *_ in answers] == [0, 0] and "accuracy" in answers[0][1], answers
    split = json.loads((tmp_path / "scored.jsonl").read_text().splitlines()[0])
    assert split["rejected_reward"] == pytest.approx(first["rejected_reward"], abs=1e-5)


def test_a_language_model_scores_nothing(score):
    ((code, _, told),) = score([TALK], model="language")
    assert code == 2 and "which has no scalar head to score answers with" in told
