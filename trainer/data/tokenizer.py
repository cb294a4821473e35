"""The tokenizer: a Hugging Face directory read offline, the tokens around a document, and the hash of its vocabulary.

Torch-free and quick to import, since every preprocessing worker loads it. Knows nothing of datasets.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from configs.errors import BadInput, in_one_line
from trainer.disk.snapshots import find_snapshot

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

END_OF_DOCUMENT = "<|endoftext|>"
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Tokenizer:
    """A loaded tokenizer. Text is only ever text: special tokens spelled out in a document are encoded as characters,
    so that no document can forge the end of a document."""

    directory: str
    backend: Backend
    eod_token: str
    eod_id: int  # ends every document
    bos_id: int | None = None  # begins every document, where the data is made so

    def encode(self, text: str) -> list[int]:
        """Encode one text to token ids, without special tokens."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode several texts to token ids, without special tokens."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode whole documents to token ids, with the tokens that begin and end one."""
        documents = self.encode_batch(texts)
        for ids in documents:
            if self.bos_id is not None:
                ids.insert(0, self.bos_id)
            ids.append(self.eod_id)
        return documents

    def decode(self, ids: Sequence[int]) -> str:
        """Decode token ids to text; special tokens are left out."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    @property
    def vocab_size(self) -> int:
        """Token ids a model needs for this tokenizer: the largest id plus one."""
        return self._tokens[-1][0] + 1

    @cached_property
    def vocabulary_hash(self) -> str:
        """SHA-256 of every (id, token): what data and tokenizer must share. Merges have no part in it."""
        return hashlib.sha256(json.dumps(self._tokens, ensure_ascii=True, separators=(",", ":")).encode()).hexdigest()

    @cached_property
    def _tokens(self) -> list[tuple[int, str]]:
        """Every id with its token, added tokens included, by id."""
        # Asked id by id: of 262,145 tokens, the dictionary and its sorting take half a second more.
        by_id = [self.backend.id_to_token(number) for number in range(self.backend.get_vocab_size())]
        known = [(number, token) for number, token in enumerate(by_id) if token is not None]
        if len(known) == len(by_id):
            return known
        # ids with gaps, or shared by two tokens
        return sorted((number, token) for token, number in self.backend.get_vocab().items())


def load_tokenizer(directory: str | os.PathLike[str], *, eod: str | None = None, bos: bool = False) -> Tokenizer:
    """Load the Hugging Face tokenizer of `directory` without a network. Raises BadInput when it cannot be used.

    Documents end in the token `eod`, by default the tokenizer's eos token, and with `bos` begin with its BOS token.
    """
    path = Path(directory)
    if not path.is_dir():
        raise BadInput(f"tokenizer {directory}: no such directory; train one with tools/train_tokenizer.py --out DIR")
    path = find_tokenizer_directory(path)
    backend = _load_backend(path)
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    if eod is not None:
        _check_end_of_document(eod, directory, backend)
    token = _end_of_document_token(path, backend) if eod is None else eod
    number = backend.token_to_id(token)
    if number is None:
        raise BadInput(f"tokenizer {directory}: its eos token {token!r} is not in its vocabulary; set eos_token right")
    begin = _begin_of_document_id(path, backend) if bos else None
    if begin == number:
        raise BadInput(f"--bos: {token} ends documents and would begin them too; leave --bos out, or set another --eod")
    return Tokenizer(str(path), backend, token, number, begin)


def find_tokenizer_directory(path: Path) -> Path:
    """Return the directory with the tokenizer's files: the one given, or the snapshot of a Hugging Face cache's folder.

    Raises BadInput where that has several and no word which is meant.
    """
    return find_snapshot(path, ("tokenizer.json", "tokenizer_config.json"))


def special_tokens(backend: Backend) -> list[str]:
    """Return the tokens that no text can hold, in the order of their ids."""
    return [token.content for _, token in sorted(backend.get_added_tokens_decoder().items()) if token.special]


def template_prefix(backend: Backend) -> list[int]:
    """Return the ids that the tokenizer's own template puts in front of a text."""
    encoding = backend.encode("a", add_special_tokens=True)
    pairs = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
    return [number for number, is_special in takewhile(lambda pair: pair[1], pairs)]


def _load_backend(path: Path) -> Backend:
    """Read tokenizer.json with the plain tokenizers library; let transformers convert what has only older files."""
    from tokenizers import Tokenizer as Backend

    file = path / "tokenizer.json"
    if file.is_file():
        try:
            return Backend.from_buffer(file.read_bytes().removeprefix(_BOM))
        except Exception as error:  # the library raises a bare Exception for every kind of bad file
            raise BadInput(f"tokenizer {file}: not readable ({in_one_line(error)}); copy or train it anew") from error
    try:
        from transformers import AutoTokenizer

        converted = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        return converted.backend_tokenizer
    except Exception as error:  # transformers raises many unrelated types for a directory it cannot read
        raise BadInput(
            f"tokenizer {path}: it has no tokenizer.json, and transformers can make none of what is there "
            f"({in_one_line(error)}); copy one from where the tokenizer is from"
        ) from error


def _end_of_document_token(path: Path, backend: Backend) -> str:
    """Find the eos token in the files Hugging Face keeps it in, newest convention first."""
    token = _named_token(path, "eos_token")
    if token is not None:
        return token
    for name in ("generation_config.json", "config.json"):
        number = read_json(path / name).get("eos_token_id")
        number = number[0] if isinstance(number, list) and number else number
        token = backend.id_to_token(number) if isinstance(number, int) else None
        if token is not None:
            return token
    raise BadInput(
        f"tokenizer {path}: it names no eos token, which ends every document; "
        f'set "eos_token" in {path / "tokenizer_config.json"}, for example to "{END_OF_DOCUMENT}"'
    )


def _begin_of_document_id(path: Path, backend: Backend) -> int:
    """Find the BOS token: the one the tokenizer's files name, else the one its template begins with."""
    token = _named_token(path, "bos_token")
    number = None if token is None else backend.token_to_id(token)
    if token is not None and number is None:
        raise BadInput(f"tokenizer {path}: its bos token {token!r} is not in its vocabulary; set bos_token right")
    prefix = template_prefix(backend) if number is None else [number]
    if not prefix:
        raise BadInput(
            f'--bos: tokenizer {path} names no BOS token; leave --bos out, or set "bos_token" in '
            f"{path / 'tokenizer_config.json'}"
        )
    return prefix[0]


def _check_end_of_document(token: str, directory: str | os.PathLike[str], backend: Backend) -> None:
    """Refuse a token that is none, or one that a text could hold: any document could then end another."""
    special = special_tokens(backend)
    if token not in special:
        ordinary = ", but an ordinary one, which text can hold" if backend.token_to_id(token) is not None else ""
        some = ", ".join(special[:8]) or "none"
        raise BadInput(f"--eod {token!r}: not a special token of tokenizer {directory}{ordinary}; those begin: {some}")


def _named_token(path: Path, key: str) -> str | None:
    """Return the token that the tokenizer's own files give for `eos_token` or `bos_token`, if any."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = read_json(path / name).get(key)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            return token
    return None


def read_json(file: Path) -> dict:
    """Read one of a tokenizer's JSON files; empty where there is none. Raises BadInput."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_bytes().removeprefix(_BOM))
    except ValueError as error:
        raise BadInput(f"tokenizer {file}: not valid JSON ({error}); copy it anew") from error
    return content if isinstance(content, dict) else {}
