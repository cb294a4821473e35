"""A small real corpus, and `trainer.run.run` itself on the pool's ranks."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from configs.load import load_config
from configs.rules.check import check_config
from tests.pool import Place
from tools.preprocess_data import preprocess
from tools.train_tokenizer import train_tokenizer
from trainer.data.making.documents import InputFile
from trainer.data.making.workers import Recipe

SENTENCES = [
    "def add(a, b):\n    return a + b\n",
    "import os\nprint(os.getcwd())\n",
    "for i in range({n}):\n    pass\n",
]


def write_text(path: Path, first: int, num_documents: int) -> InputFile:
    """Write JSON lines of short Python-like documents."""
    texts = (SENTENCES[n % 3].replace("{n}", str(n)) * (1 + n % 5) for n in range(first, first + num_documents))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return InputFile(str(path), "jsonl")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Return a directory with `tokenizer`, `train.*` and `validation.*`."""
    folder = tmp_path_factory.mktemp("corpus")
    train = write_text(folder / "train.jsonl", 0, 600)
    validation = write_text(folder / "validation.jsonl", 600, 40)
    tokenizer = str(folder / "tokenizer")
    train_tokenizer([train], tokenizer, 300)
    preprocess([train], Recipe(tokenizer), str(folder / "train"))
    preprocess([validation], Recipe(tokenizer), str(folder / "validation"))
    return folder


@pytest.fixture
def recipe(corpus, tmp_path) -> Path:
    """Return the YAML of a tiny run on the corpus."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"""
run: {{dir: {tmp_path / "run"}}}
model: {{num_layers: 2, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 4, num_query_groups: 2,
         vocab_size: 300, vocab_pad_multiple: 16, max_position_embeddings: 64, tie_embeddings: true}}
precision: {{compute: fp32}}
parallel: {{timeout_seconds: 60}}
data:
  tokenizer: {corpus / "tokenizer"}
  train: [{{path: {corpus / "train"}}}]
  validation: [{{path: {corpus / "validation"}}}]
train: {{num_steps: 6, seq_len: 32, global_batch_size: 8, micro_batch_size: 2, eval_num_samples: 10}}
optimizer: {{lr: 1.0e-2, min_lr: 1.0e-3}}
checkpoint: {{save_every: 2, keep_last: 10}}
""",
        encoding="utf-8",
    )
    return path


def train_on_ranks(
    place: Place, path: str, overrides: tuple[str, ...], port: int, fault: str | None, stage: str
) -> Any:
    """Run a stage as `launch` does; return its exit code, or the class and text of what it raised."""
    import os
    from unittest.mock import patch

    from configs.errors import ShardwrightError
    from parallel.environment import Environment
    from tests.end_to_end.faults import inject
    from trainer.report.log import start_console
    from trainer.run.run import run

    start_console(place.rank)
    environment = Environment(
        rank=place.rank, world_size=place.world_size, local_world_size=place.world_size, master_port=port
    )
    config = load_config(path, overrides, stage)
    problems = check_config(config, place.world_size, platform="cpu", has_te=False)
    assert not problems, problems
    try:
        with patch.dict(os.environ, environment.as_variables()), inject(fault, place.rank):
            return int(run(config, stage, environment, "cpu")), ""
    except ShardwrightError as error:
        return int(error.exit_code), str(error)


@pytest.fixture
def train(ranks, recipe):
    """Return a function that trains the recipe: `train(world, *overrides, fault=None) -> (exit code, sentence)`."""

    def run_on_ranks(world: int, *overrides: str, fault: str | None = None, stage: str = "pretrain") -> tuple[int, str]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        answers = ranks.run(train_on_ranks, str(recipe), overrides, port, fault, stage, world=world)
        assert len({code for code, _ in answers}) == 1, answers
        return answers[0]

    return run_on_ranks


@pytest.fixture(scope="session")
def questions(tmp_path_factory) -> Path:
    """Return a folder with `tokenizer`, which has ChatML's tokens, and `questions.jsonl`."""
    folder = tmp_path_factory.mktemp("questions")
    special = ("<|im_start|>", "<|im_end|>")
    train_tokenizer([write_text(folder / "text.jsonl", 0, 300)], str(folder / "tokenizer"), 320, special_tokens=special)
    rows = [{"prompt": f"{n} + {n}?", "answer": str(2 * n)} for n in range(12)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
