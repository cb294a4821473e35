"""What a teacher says of documents, kept on disk by what the documents are: its likeliest ids of every trained token.

A directory of `cache.json` and, of each rank that wrote, `part_N.index` (int64 `[documents, 2]`, little-endian: a hash
of tokens, labels and mask, and the documents' first record) and `part_N.records`: for each trained token in order k
fp32 log-probabilities, falling, k int32 ids, and the log of all other ids' probability, 8 k + 4 bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from configs.errors import BadInput
from trainer.data.batch import Batch
from trainer.engine.sharded_model import ShardedModel
from trainer.model.divergence import Diverge, TopK
from trainer.model.output_divergence import Lesson
from trainer.rl.teacher import TOP_K, make_lesson

INFO = "cache.json"
_FORMAT = 1
_FIELD = "distill.cache"
_ANEW = "write another with launch/teacher_cache.py"


@dataclass(frozen=True)
class CacheInfo:
    """What a cache is of."""

    top_k: int
    temperature: float
    vocab_size: int
    seq_len: int
    """Of the rows: longer documents are cut by it."""
    tokenizer: str
    """SHA-256 of its vocabulary."""
    teacher: Mapping[str, str]
    """Where its weights lay, and their fingerprint."""
    sources: Mapping[str, str]
    """Identity of each tokenised source, by its path."""
    num_parts: int
    num_records: int = 0
    num_documents: int = 0
    format: int = _FORMAT

    def write(self, directory: Path) -> None:
        """Write `cache.json`."""
        (directory / INFO).write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> CacheInfo:
        """Read `cache.json`. Raises BadInput where it is missing or of another format."""
        try:
            fields = json.loads((directory / INFO).read_text(encoding="utf-8"))
            info = cls(**fields)
        except (OSError, ValueError, TypeError) as error:
            raise BadInput(f"{_FIELD}: {directory} is no cache of a teacher ({error}); {_ANEW}") from error
        if info.format != _FORMAT:
            raise BadInput(f"{_FIELD}: {directory} has format {info.format}, not {_FORMAT}; {_ANEW}")
        return info


def record_type(k: int) -> np.dtype[Any]:
    """Return how a trained token's record lies in the file."""
    return np.dtype([("log_probs", "<f4", (k,)), ("ids", "<i4", (k,)), ("rest", "<f4")])


class CachePart:
    """What one rank writes; documents that it has are not written again."""

    def __init__(self, directory: Path, number: int, k: int) -> None:
        self._index = (directory / f"part_{number}.index").open("wb")
        self._records = (directory / f"part_{number}.records").open("wb")
        self._type = record_type(k)
        self._known: set[int] = set()
        self.num_records = 0

    @property
    def num_documents(self) -> int:
        """Documents that were written."""
        return len(self._known)

    def add(self, batch: Batch, said: TopK) -> None:
        """Write what is said of each document of a batch."""
        log_probs, ids, rest = (one.flatten(0, 1).cpu().numpy() for one in said)
        for key, trained in _documents(batch):
            if key in self._known:
                continue
            self._known.add(key)
            records = np.empty(len(trained), self._type)
            records["log_probs"], records["ids"], records["rest"] = log_probs[trained], ids[trained], rest[trained]
            self._index.write(np.array([key, self.num_records], dtype="<i8").tobytes())
            self._records.write(records.tobytes())
            self.num_records += len(trained)

    def close(self) -> None:
        """Finish the files."""
        self._index.close()
        self._records.close()


class CachedTeacher:
    """A teacher of whom only a cache is there; its columns are added as rows are read."""

    def __init__(self, directory: Path, *, is_last_pp_stage: bool) -> None:
        """Open the files; 24 bytes of memory a document. Raises BadInput where they are missing or damaged."""
        self.info = CacheInfo.read(directory)
        self.temperature = self.info.temperature
        self._num_ids: int | None = None
        self._directory, self._is_needed = directory, is_last_pp_stage
        kind = record_type(self.info.top_k)
        self._parts, tables = [], []
        for number in range(self.info.num_parts):
            index, records = (directory / f"part_{number}.{name}" for name in ("index", "records"))
            try:
                table = np.fromfile(index, dtype="<i8").reshape(-1, 2)
                size = records.stat().st_size
                self._parts.append(np.memmap(records, dtype=kind, mode="r") if size else np.empty(0, kind))
            except (OSError, ValueError) as error:
                raise BadInput(f"{_FIELD}: {directory} is damaged ({error}); {_ANEW}") from error
            tables.append(np.column_stack([table, np.full(len(table), number)]))
        table = np.concatenate(tables)
        there = sum(len(part) for part in self._parts), len(table)
        if there != (self.info.num_records, self.info.num_documents):
            raise BadInput(
                f"{_FIELD}: {directory} is damaged, it has {there[0]} records of {there[1]} documents and {INFO} says "
                f"{self.info.num_records} of {self.info.num_documents}; {_ANEW}"
            )
        self._table = table[np.argsort(table[:, 0], kind="stable")]  # [documents, 3]: key, first record, part

    def check(self, *, vocab_size: int, seq_len: int, temperature: float, tokenizer: str) -> None:
        """Take `vocab_size` for the student's. Raises BadInput where the cache is not of this run's tokens."""
        info, place = self.info, self._directory
        self._num_ids = info.vocab_size if info.vocab_size < vocab_size else None
        if info.tokenizer != tokenizer:
            raise BadInput(f"{_FIELD}: {place} was written with another tokenizer than data.tokenizer; {_ANEW}")
        if info.vocab_size > vocab_size:  # what is listed is a share of them all
            raise BadInput(
                f"{_FIELD}: {place} was written with a vocabulary of {info.vocab_size}, more than model.vocab_size="
                f"{vocab_size} of this run; {_ANEW} of a model of as many, or name the model as distill.teacher"
            )
        for field, there, here in (
            ("train.seq_len", info.seq_len, seq_len),
            ("distill.temperature", info.temperature, temperature),
        ):
            if there != here:
                raise BadInput(
                    f"{field}: {here:g}, and {_FIELD} {place} was written with {there:g}; a value that would work: "
                    f"{there:g} (or {_ANEW})"
                )

    def check_source(self, field: str, path: str, identity: str) -> None:
        """Raise BadInput where a source of tokens is not one that the cache knows."""
        if identity not in self.info.sources.values():
            known = ", ".join(self.info.sources) or "nothing"
            raise BadInput(
                f"{field}: {path}, as it is now with its template, is not what {_FIELD} {self._directory} was "
                f"written of ({known}); give the data of then, or {_ANEW}"
            )

    def finish(self, batch: Batch) -> Batch:
        """Return a microbatch with the columns of its documents. Raises BadInput for one that the cache has not."""
        found = [(trained, self._find(key)) for key, trained in _documents(batch)]
        if not self._is_needed:
            return batch
        k, num_tokens = self.info.top_k, batch.tokens.numel()
        log_probs = np.full((num_tokens, k), -np.log(k), dtype=np.float32)  # of what is not trained: of no meaning
        ids, rest = np.tile(np.arange(k, dtype=np.int32), (num_tokens, 1)), np.full(num_tokens, -30.0, np.float32)
        for trained, (part, first) in found:
            records = self._parts[part][first : first + len(trained)]
            log_probs[trained], ids[trained], rest[trained] = records["log_probs"], records["ids"], records["rest"]
        shape = batch.tokens.shape
        said = (torch.from_numpy(one).view(*shape, *one.shape[1:]) for one in (log_probs, ids, rest))
        return replace(batch, columns={**batch.columns, **dict(zip(TOP_K, said, strict=True))})

    def annotate(self, engine: ShardedModel, batches: Sequence[Batch]) -> list[Batch]:
        """Return the microbatches as they are: they were read with their columns."""
        return list(batches)

    def lesson(self, batch: Batch, diverge: tuple[Diverge, ...], *, has_labels: bool) -> Lesson:
        """Return the comparison with the columns of a batch."""
        return make_lesson(batch, self.temperature, diverge, TOP_K, None, self._num_ids, has_labels=has_labels)

    def _find(self, key: int) -> tuple[int, int]:
        place = int(np.searchsorted(self._table[:, 0], key))
        if place == len(self._table) or self._table[place, 0] != key:
            raise BadInput(
                f"{_FIELD}: {self._directory} has nothing of a document that this run reads; give the data and "
                f"sft.train_on of then, or {_ANEW}"
            )
        _, first, part = self._table[place].tolist()
        return part, first


def _documents(batch: Batch) -> list[tuple[int, NDArray[np.int64]]]:
    """Return of each document that is trained a hash, and the places of its trained tokens in the whole batch."""
    assert batch.documents is not None
    tokens, labels, mask = (one.flatten().numpy() for one in (batch.tokens, batch.labels, batch.loss_mask))
    found = []
    for start, end in pairwise(batch.documents.bounds):
        trained = np.flatnonzero(mask[start:end]) + start
        if len(trained):
            last = int(trained[-1]) + 1
            content = b"".join(part[start:last].tobytes() for part in (tokens, labels, mask))
            digest = hashlib.blake2b(content, digest_size=8).digest()
            found.append((int.from_bytes(digest, "little", signed=True), trained))
    return found
