"""The files of a dataset as a whole: are they there, do their sizes agree, and what `<prefix>.meta.json` says.

Torch-free and numpy-free, so that a command that only looks whether data is there starts at once.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from configs.errors import BadInput
from trainer.data.index_file import COPY_OR_MAKE_AGAIN, MAKE_AGAIN, IndexHeader, read_header

MASK_SUFFIX = ".mask"
"""Of the file with a byte for each token that is 1 where the token is trained."""
MARGINS_SUFFIX = ".margins"
"""Of the file with the fp32 margin of each document of comparisons: by how much the better one of its pair is."""


@dataclass(frozen=True)
class DatasetMeta:
    """What `<prefix>.meta.json` says: the tokenizer the data was made with, its size and where it came from."""

    vocabulary_hash: str
    vocab_size: int
    eod_id: int
    dtype: str
    num_documents: int
    num_tokens: int
    num_empty_documents: int
    fingerprint: str
    bin_sha256: str
    idx_sha256: str
    sources: list[dict[str, str | int]] = field(default_factory=list)
    eod_token: str | None = None  # None: made before it was written down
    bos_id: int | None = None  # what every document begins with, if anything
    num_missing_documents: int = 0  # records without text, left out
    mask_sha256: str | None = None  # of `<prefix>.mask`, a byte a token: is it trained? None: there is none, all are
    margins_sha256: str | None = None  # of `<prefix>.margins`; None: there is none, all are 0

    def write(self, file: Path) -> None:
        """Write as JSON, atomically."""
        temporary = file.with_name(file.name + ".tmp")
        temporary.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, file)


def check_sizes(prefix: str) -> IndexHeader:
    """Check that `<prefix>.bin` and `.idx` are there and have the sizes they must have; quick for any size of data.

    Raises BadInput with what to do.
    """
    idx, data = Path(prefix + ".idx"), Path(prefix + ".bin")
    for file in (data, idx):
        if not file.is_file():
            plain = prefix.removesuffix(".bin").removesuffix(".idx")
            if plain != prefix and Path(plain + ".bin").is_file():
                raise BadInput(f"data {prefix}: both of its files have one name; a value that would work: {plain}")
            raise BadInput(f"data {file}: no such file; {MAKE_AGAIN} --out {prefix}")
    header = read_header(idx)
    check_size(data, header.num_tokens * header.itemsize)
    meta = read_meta(prefix)
    if meta is not None and meta.mask_sha256 is not None:
        mask = Path(prefix + MASK_SUFFIX)
        if not mask.is_file():
            raise BadInput(f"data {mask}: no such file; {COPY_OR_MAKE_AGAIN}")
        check_size(mask, header.num_tokens)
    if meta is not None and meta.margins_sha256 is not None:
        margins = Path(prefix + MARGINS_SUFFIX)
        if not margins.is_file():
            raise BadInput(f"data {margins}: no such file; {COPY_OR_MAKE_AGAIN}")
        check_size(margins, 4 * meta.num_documents)
    if header.num_tokens == 0:
        raise BadInput(f"data {data}: it holds no tokens; {MAKE_AGAIN} from files with text")
    return header


def check_size(data: Path, expected: int) -> None:
    """Refuse a `.bin` file that has not the bytes its `.idx` says."""
    found = data.stat().st_size
    if found != expected:
        word = "truncated" if found < expected else "too long"
        idx = data.with_suffix(".idx").name
        raise BadInput(f"data {data}: {word}, {found} bytes where {idx} says {expected}; {COPY_OR_MAKE_AGAIN}")


def read_meta(prefix: str) -> DatasetMeta | None:
    """Read `<prefix>.meta.json`; None where there is none, as beside data made by Megatron-LM's own tools."""
    file = Path(prefix + ".meta.json")
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_bytes())
        unknown = set(content) - {field.name for field in fields(DatasetMeta)}
        if unknown:
            raise BadInput(
                f"data {file}: this version does not know {', '.join(sorted(unknown))}; use the version that wrote it, "
                f"or {MAKE_AGAIN}"
            )
        return DatasetMeta(**content)
    except (ValueError, TypeError) as error:
        raise BadInput(f"data {file}: not readable ({error}); {MAKE_AGAIN}") from error
