"""The parts of a dataset being made: finished pieces on disk with a manifest, and their merging into `.bin` and `.idx`.

A kill at any moment loses only the part being written. Torch-free. Knows nothing of text.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from configs.errors import BadInput
from trainer.data.index_file import write_index

_COPIED_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class TokenizedBlock:
    """The documents of one block as token ids, each ending in the end-of-document token."""

    tokens: bytes  # of the dataset's dtype
    lengths: NDArray[np.int32]  # [num_documents] tokens of each
    num_empty: int  # documents without text, left out
    num_text_bytes: int
    num_missing: int = 0  # records without text, left out


@dataclass(frozen=True)
class Part:
    """What one part holds; `Part.plus` adds up."""

    num_blocks: int = 0
    num_documents: int = 0
    num_tokens: int = 0
    num_empty: int = 0
    num_text_bytes: int = 0
    num_missing: int = 0

    def plus(self, other: Part) -> Part:
        """Return the sums of both."""
        mine, theirs = asdict(self), asdict(other)
        return Part(**{name: mine[name] + theirs[name] for name in mine})


class PartStore:
    """The directory `<prefix>.parts`, held by one process at a time."""

    def __init__(self, directory: Path, fingerprint: str, dtype: type[np.integer]) -> None:
        """Open or create it. Raises BadInput when it belongs to other inputs, is in use or is damaged."""
        self.directory = directory
        self.dtype = dtype
        self._fingerprint = fingerprint
        directory.mkdir(parents=True, exist_ok=True)
        self._lock = (directory / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BadInput(
                f"{directory}: another process is at work there; wait for it or choose another --out"
            ) from error
        self.parts = self._read_manifest()
        self._open = Part()
        self._stream: BinaryIO | None = None
        self._lengths: list[NDArray[np.int32]] = []

    @property
    def total(self) -> Part:
        """Sums over the finished parts."""
        total = Part()
        for part in self.parts:
            total = total.plus(part)
        return total

    def append(self, block: TokenizedBlock) -> Part:
        """Add the next block to the part being written; return what it added."""
        if self._stream is None:
            self._stream = self._file(len(self.parts), "tokens").open("wb")
        self._stream.write(block.tokens)
        self._lengths.append(block.lengths)
        num_tokens = len(block.tokens) // np.dtype(self.dtype).itemsize
        added = Part(1, len(block.lengths), num_tokens, block.num_empty, block.num_text_bytes, block.num_missing)
        self._open = self._open.plus(added)
        return added

    def finish_part(self) -> None:
        """Make the part being written permanent: its files reach the disk before the manifest names it."""
        if self._stream is None or not self._open.num_blocks:
            return
        # Ctrl-C may have come in the middle of `append`, which counts a block last: what it did not count is cut off.
        self._stream.truncate(self._open.num_tokens * np.dtype(self.dtype).itemsize)
        _close_synced(self._stream)
        with self._file(len(self.parts), "lengths").open("wb") as stream:
            stream.write(np.concatenate(self._lengths)[: self._open.num_documents].astype(np.int32).tobytes())
            _close_synced(stream)
        self.parts.append(self._open)
        manifest = {"fingerprint": self._fingerprint, "parts": [asdict(part) for part in self.parts]}
        _write_synced(self.directory / "manifest.json", json.dumps(manifest).encode())
        self._open, self._stream, self._lengths = Part(), None, []

    def merge(self, bin_path: Path, idx_path: Path, progress: Callable[[int], None]) -> None:
        """Write all parts as one Megatron dataset; `progress` is told the documents written so far."""
        kept = [number for number, part in enumerate(self.parts) if part.num_documents]
        num_written = 0
        with bin_path.open("wb") as stream:
            for number in kept:
                with self._file(number, "tokens").open("rb") as tokens:
                    shutil.copyfileobj(tokens, stream, _COPIED_AT_ONCE)
                num_written += self.parts[number].num_documents
                progress(num_written)
            _close_synced(stream)
        lengths = [np.memmap(self._file(number, "lengths"), dtype=np.int32, mode="r") for number in kept]
        write_index(idx_path, self.dtype, lengths)

    def remove(self) -> None:
        """Delete the directory."""
        shutil.rmtree(self.directory)
        self._lock.close()

    def give_up(self) -> None:
        """Let go of the directory after an error: finished parts stay for a second attempt, the open one is lost."""
        if self._stream is not None:
            self._stream.close()
        if not self.parts:
            shutil.rmtree(self.directory)
        self._lock.close()

    def _file(self, number: int, what: str) -> Path:
        return self.directory / f"part_{number:06d}.{what}"

    def _read_manifest(self) -> list[Part]:
        file = self.directory / "manifest.json"
        if not file.is_file():
            return []
        advice = f"delete {self.directory} to begin anew, or choose another --out"
        try:
            manifest = json.loads(file.read_text(encoding="utf-8"))
            parts = [Part(**entry) for entry in manifest["parts"]]
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{file}: not readable ({error}); {advice}") from error
        if manifest["fingerprint"] != self._fingerprint:
            raise BadInput(f"{self.directory}: left by a run with other inputs, tokenizer or settings; {advice}")
        itemsize = np.dtype(self.dtype).itemsize
        for number, part in enumerate(parts):
            expected = {"tokens": part.num_tokens * itemsize, "lengths": part.num_documents * 4}
            for what, num_bytes in expected.items():
                path = self._file(number, what)
                if not path.is_file() or path.stat().st_size != num_bytes:
                    raise BadInput(f"{path}: missing or not the {num_bytes} bytes the manifest says; {advice}")
        return parts


def hash_file(path: str | Path) -> str:
    """Compute the SHA-256 of a file."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_synced(path: Path, content: bytes) -> None:
    """Replace a file atomically, on the disk before it can be seen."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as stream:
        stream.write(content)
        _close_synced(stream)
    os.replace(temporary, path)


def _close_synced(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()


def write_dataset(prefix: Path, tokens: NDArray[np.integer], lengths: NDArray[np.int32]) -> None:
    """Write `<prefix>.bin` and `.idx` at once: documents of `lengths`, their tokens end to end and of their dtype."""
    store = PartStore(Path(f"{prefix}.parts"), "at once", tokens.dtype.type)
    store.append(TokenizedBlock(tokens.tobytes(), lengths, num_empty=0, num_text_bytes=0))
    store.finish_part()
    store.merge(Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), lambda num_written: None)
    store.remove()
