"""A tokenizer with digits of their own: the same ids, every number cut alike, texts unchanged, bad requests told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from configs.errors import BadInput
from tools.split_digits import main, split_digits
from trainer.data.tokenizer import load_tokenizer


def test_numbers_are_cut_into_digits_and_nothing_else_changes(tokenizer_directory, tmp_path):
    from transformers import AutoTokenizer

    out = tmp_path / "digits"
    assert main([str(tokenizer_directory), "--out", str(out)]) == 0
    before, after = load_tokenizer(tokenizer_directory), load_tokenizer(out)
    assert after.vocabulary_hash == before.vocabulary_hash
    theirs = AutoTokenizer.from_pretrained(out, local_files_only=True)
    for text in ("12345 and 80", "a80 80", '{"a": "3 * 77"}'):
        ids = after.encode(text)
        assert after.decode(ids) == text and theirs.encode(text, add_special_tokens=False) == ids
        pieces = [after.decode([token]) for token in ids]
        assert [piece for piece in pieces if any(letter.isdigit() for letter in piece)] == [
            letter for letter in text if letter.isdigit()
        ]
    words = "plain words without numbers"
    assert after.encode(words) == before.encode(words)
    with pytest.raises(BadInput, match="exists already"):
        split_digits(str(tokenizer_directory), str(out))


def test_a_vocabulary_without_digits_is_refused_and_nothing_left(tokenizer_directory, tmp_path):
    poor = tmp_path / "poor"
    poor.mkdir()
    for file in Path(tokenizer_directory).iterdir():
        (poor / file.name).write_bytes(file.read_bytes())
    content = json.loads((poor / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {("no-" + token if token == "7" else token): one for token, one in vocabulary.items()}
    content["model"]["merges"] = [
        pair for pair in content["model"]["merges"] if not any("7" in piece for piece in pair)
    ]
    (poor / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(BadInput, match="digits are no tokens"):
        split_digits(str(poor), str(tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["poor"]
