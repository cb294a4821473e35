"""The tokenizer: a Hugging Face directory read offline, its end-of-document token, and the hash of its vocabulary.

Torch-free and quick to import, since every preprocessing worker loads it. Knows nothing of datasets.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from configs.errors import BadInput

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

END_OF_DOCUMENT = "<|endoftext|>"


@dataclass(frozen=True)
class Tokenizer:
    """A loaded tokenizer. Text is only ever text: special tokens spelled out in a document are encoded as characters,
    so that no document can forge the end of a document."""

    directory: str
    backend: Backend
    eod_token: str
    eod_id: int

    def encode(self, text: str) -> list[int]:
        """Encode one text to token ids, without special tokens."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode several texts to token ids, without special tokens."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Decode token ids to text; the end-of-document token is left out."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Every token and its id, added tokens included."""
        return self.backend.get_vocab(with_added_tokens=True)

    @property
    def vocab_size(self) -> int:
        """Token ids a model needs for this tokenizer: the largest id plus one."""
        return max(self.vocabulary.values()) + 1

    @cached_property
    def vocabulary_hash(self) -> str:
        """SHA-256 of every (id, token): what data and tokenizer must share. Merges have no part in it."""
        pairs = sorted((number, token) for token, number in self.vocabulary.items())
        return hashlib.sha256(json.dumps(pairs, ensure_ascii=True, separators=(",", ":")).encode()).hexdigest()


def load_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
    """Load the Hugging Face tokenizer of `directory` without a network. Raises BadInput when it cannot be used."""
    path = Path(directory)
    if not path.is_dir():
        raise BadInput(f"tokenizer {directory}: no such directory; train one with tools/train_tokenizer.py --out DIR")
    backend = _load_backend(path)
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    token = _end_of_document_token(path, backend)
    number = backend.token_to_id(token)
    if number is None:
        raise BadInput(f"tokenizer {directory}: its eos token {token!r} is not in its vocabulary; set eos_token right")
    return Tokenizer(str(directory), backend, token, number)


def _load_backend(path: Path) -> Backend:
    """Read tokenizer.json with the plain tokenizers library; let transformers convert what has only older files."""
    from tokenizers import Tokenizer as Backend

    file = path / "tokenizer.json"
    if file.is_file():
        try:
            return Backend.from_file(str(file))
        except Exception as error:  # the library raises a bare Exception for every kind of bad file
            raise BadInput(f"tokenizer {file}: not readable ({error}); copy or train it anew") from error
    try:
        from transformers import AutoTokenizer

        converted = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        return converted.backend_tokenizer
    except Exception as error:  # transformers raises many unrelated types for a directory it cannot read
        raise BadInput(f"tokenizer {path}: it has no tokenizer.json to read ({error}); copy one") from error


def _end_of_document_token(path: Path, backend: Backend) -> str:
    """Find the eos token in the files Hugging Face keeps it in, newest convention first."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _read_json(path / name).get("eos_token")
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            return token
    for name in ("generation_config.json", "config.json"):
        number = _read_json(path / name).get("eos_token_id")
        number = number[0] if isinstance(number, list) and number else number
        token = backend.id_to_token(number) if isinstance(number, int) else None
        if token is not None:
            return token
    raise BadInput(
        f"tokenizer {path}: it names no eos token, which ends every document; "
        f'set "eos_token" in {path / "tokenizer_config.json"}, for example to "{END_OF_DOCUMENT}"'
    )


def _read_json(file: Path) -> dict:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"tokenizer {file}: not valid JSON ({error}); copy it anew") from error
    return content if isinstance(content, dict) else {}
