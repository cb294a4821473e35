"""A small tokenizer and a small corpus that the data commands' tests share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.train_tokenizer import train_tokenizer
from trainer.data.making.documents import InputFile

SENTENCE = "Größe, naïve café — 日本語 🙂 and def function(argument):\n    return argument + 1  # line {number}\n"


def document(number: int) -> str:
    """A document of its own for every number; each tenth is empty."""
    return "" if number % 10 == 9 else SENTENCE.format(number=number) * (1 + number % 4)


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    text = folder / "text.txt"
    text.write_text("".join(document(number) for number in range(40)), encoding="utf-8")
    train_tokenizer([InputFile(str(text), "text")], str(folder / "trained"), 340)
    return str(folder / "trained")


@pytest.fixture(scope="session")
def jsonl(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("jsonl") / "documents.jsonl"
    lines = [json.dumps({"text": document(number), "id": number}, ensure_ascii=False) for number in range(400)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file
