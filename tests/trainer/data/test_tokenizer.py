"""What a tokenizer's vocabulary is known by, whatever its ids, and what is said of a directory without one."""

from __future__ import annotations

import hashlib
import json
import sys
from types import SimpleNamespace

import pytest
from tokenizers import AddedToken, models
from tokenizers import Tokenizer as Backend

from configs.errors import BadInput
from trainer.data.tokenizer import Tokenizer, load_tokenizer

VOCABULARIES = {
    "dense": {"a": 1, "b": 0, "é": 2},
    "gaps": {"a": 7, "b": 0, "é": 2},
    "shared": {"a": 0, "b": 0, "é": 1},
    "shared and dense": {"a": 0, "b": 0, "é": 1, "c": 2},
}


@pytest.mark.parametrize("vocabulary", VOCABULARIES.values(), ids=VOCABULARIES.keys())
def test_size_and_hash_are_of_every_token(vocabulary):
    backend = Backend(models.WordLevel(vocabulary, unk_token="a"))
    backend.add_special_tokens([AddedToken("<end>", special=True)])
    backend.add_tokens(["b", "further"])
    tokenizer = Tokenizer("directory", backend, "<end>", 0)
    pairs = sorted((number, token) for token, number in backend.get_vocab(with_added_tokens=True).items())
    text = json.dumps(pairs, ensure_ascii=True, separators=(",", ":"))
    assert tokenizer.vocabulary_hash == hashlib.sha256(text.encode()).hexdigest()
    assert tokenizer.vocab_size == pairs[-1][0] + 1


def test_a_vocabulary_without_gaps_is_not_made_into_a_dictionary():
    """Which, with its sorting, was half of what three documents took with 262,145 tokens."""

    def get_vocab(**options: bool) -> dict[str, int]:
        raise AssertionError("slow")

    tokens = ["<end>", "a", "b"]
    backend = SimpleNamespace(
        get_vocab=get_vocab, id_to_token=dict(enumerate(tokens)).get, get_vocab_size=lambda **options: len(tokens)
    )
    tokenizer = Tokenizer("directory", backend, "<end>", 0)
    assert tokenizer.vocab_size == 3 and tokenizer.vocabulary_hash


def test_a_directory_without_tokenizer_json_gives_one_sentence(tmp_path, monkeypatch):
    def from_pretrained(path: str, **options: bool) -> None:
        raise ValueError(
            "Couldn't instantiate from one of: \n(1) a file, \n(2) a class.\n" + "Install something. " * 99
        )

    fake = SimpleNamespace(AutoTokenizer=SimpleNamespace(from_pretrained=from_pretrained))
    monkeypatch.setitem(sys.modules, "transformers", fake)
    with pytest.raises(BadInput, match="no tokenizer.json, and transformers can make none of what is there") as caught:
        load_tokenizer(tmp_path)
    message = str(caught.value)
    assert "\n" not in message and "(1) a file, (2) a class. Install" in message and len(message) < 500
