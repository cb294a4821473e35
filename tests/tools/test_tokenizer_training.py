"""Trained tokenizers: any text survives, Hugging Face reads them, and bad requests leave nothing behind."""

from __future__ import annotations

import json
import shutil

import pytest

from configs.errors import BadInput
from tools.train_tokenizer import main
from trainer.data.tokenizer import END_OF_DOCUMENT, load_tokenizer

TEXTS = [
    "plain words",
    "  leading and   inner spaces \t\r\n\n\n trailing ",
    "Größe 日本語 العربية 🙂👩‍👩‍👧 e\u0301",
    "\x00\x01\x7f\u200b\ufeff",
    "12345 3.14e-10 x==y!=z",
    "".join(chr(code) for code in range(0x20, 0x2000)),
]


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_survives(tokenizer_directory, text):
    tokenizer = load_tokenizer(tokenizer_directory)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text, text]) == [ids, ids]
    assert max(ids) < tokenizer.vocab_size == 340


def test_transformers_reads_it_offline_and_agrees(tokenizer_directory):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tokenizer_directory, local_files_only=True)
    ours = load_tokenizer(tokenizer_directory)
    assert theirs.eos_token == theirs.bos_token == END_OF_DOCUMENT and theirs.eos_token_id == ours.eod_id
    assert len(theirs) == ours.vocab_size
    for text in TEXTS:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text


def test_text_cannot_forge_the_end_of_a_document(tokenizer_directory):
    tokenizer = load_tokenizer(tokenizer_directory)
    text = f"before{END_OF_DOCUMENT}after"
    ids = tokenizer.encode(text)
    assert tokenizer.eod_id not in ids and tokenizer.decode(ids) == text


def test_training_twice_gives_the_same_file(tmp_path, jsonl, tokenizer_directory):
    for name in "ab":
        assert main([str(jsonl), "--out", str(tmp_path / name), "--vocab-size", "300"]) == 0
    first, second = (tmp_path / name / "tokenizer.json" for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    hashes = {load_tokenizer(tmp_path / name).vocabulary_hash for name in "ab"}
    assert len(hashes) == 1 and load_tokenizer(tokenizer_directory).vocabulary_hash not in hashes


def test_bad_requests_leave_nothing(tmp_path, jsonl, capsys):
    assert main([str(jsonl), "--out", str(tmp_path / "t"), "--vocab-size", "256"]) == 2
    assert "--vocab-size: 256" in capsys.readouterr().err
    assert main([str(tmp_path / "missing"), "--out", str(tmp_path / "t"), "--vocab-size", "300"]) == 2
    assert "no such file" in capsys.readouterr().err
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"}\n{"text":\n')
    assert main([str(broken), "--out", str(tmp_path / "t"), "--vocab-size", "300"]) == 2
    assert f"{broken}:2: not valid JSON" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.jsonl"]


def test_unusable_tokenizers_are_named(tmp_path, tokenizer_directory):
    with pytest.raises(BadInput, match="no such directory"):
        load_tokenizer(tmp_path / "missing")
    copy = tmp_path / "copy"
    shutil.copytree(tokenizer_directory, copy)
    (copy / "special_tokens_map.json").unlink()
    (copy / "tokenizer_config.json").write_text("{}")
    with pytest.raises(BadInput, match="names no eos token.*tokenizer_config.json"):
        load_tokenizer(copy)
    (copy / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    with pytest.raises(BadInput, match="eos token '</s>' is not in its vocabulary"):
        load_tokenizer(copy)
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(BadInput, match="tokenizer.json: not readable"):
        load_tokenizer(copy)
