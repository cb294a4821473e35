"""Documents from files: JSON, Parquet, Arrow and plain text, also zstd or gzip compressed, in one fixed order.

Files are cut into blocks that depend on the files alone, so that many workers, or a second attempt, see the same ones.
Torch-free. Knows nothing of tokenizers or of what becomes of the text.
"""

from __future__ import annotations

import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from configs.errors import BadInput, in_one_line
from configs.paths import find_special_file
from trainer.data.making.json_array import split_array
from trainer.data.making.splits import find_other_splits
from trainer.data.making.tables import iter_batches

Kind = Literal["jsonl", "parquet", "arrow", "text"]

BLOCK_BYTES = 1 << 20
BOM = b"\xef\xbb\xbf"  # what some editors put in front of UTF-8; no part of the text
_JSONL_SUFFIXES = {".jsonl", ".json", ".ndjson"}
_COMPRESSIONS = {".zst", ".gz"}
_TEXT_SUFFIXES = set(
    ".c .cc .cfg .cpp .cs .css .go .h .hpp .html .java .js .jl .lua .md .php .pl .py .pyi .r .rb .rs .rst .scala .sh "
    ".sql .swift .tex .toml .ts .txt .xml .yaml .yml".split()
)
# What a downloaded Hugging Face dataset says of itself; `state.json` too, beside the second of them.
_HF_DESCRIPTIONS = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json"}
_ABOUT_DATA = {"readme", "license", "licence", "copying", "notice", "citation"}  # beside records, not one of them
# A text is all that is taken out of a line, so a whole number of any length will do as a float.
_JSON = json.JSONDecoder(parse_int=float)


@dataclass(frozen=True)
class InputFile:
    """One input file, what it holds and how it is compressed."""

    path: str
    kind: Kind
    compression: Literal["", ".zst", ".gz"] = ""
    keeps_bom: bool = False  # the demo's corpus has always held them, and its runs are continued

    @property
    def num_bytes(self) -> int:
        """Bytes on disk."""
        return os.stat(self.path).st_size


@dataclass(frozen=True)
class Block:
    """A run of documents small enough to send to a worker.

    `payload` is whole lines of JSONL, the texts of rows of Parquet or Arrow, or nothing: the worker opens plain text
    files itself.
    """

    files: tuple[InputFile, ...]
    first_record: int  # number of the first line or row, from 1
    payload: bytes | tuple[str | bytes | None, ...]
    num_disk_bytes: int  # of the input, for progress


def list_inputs(paths: Sequence[str]) -> tuple[list[InputFile], Counter[str]]:
    """Find the input files behind `paths`, in order; a directory gives its files sorted by path.

    Returns the files and, by suffix or name, how many files of directories were left out: for being hidden, for not
    being a known kind of text, for telling of the data rather than being it, or for being of another split than train.
    A file named outright is always read, as plain text when its suffix says nothing else. Raises BadInput.
    """
    files: list[InputFile] = []
    left_out: Counter[str] = Counter()
    for path in paths:
        if not os.path.exists(path):
            raise BadInput(f"input {path}: no such file or directory; {_advise_another(path)}")
        special = find_special_file(path)
        if special is not None:
            raise BadInput(f"input {path}: {special}, and inputs are read several times; write it to a file first")
        if not os.path.isdir(path):
            files.append(_classify(path) or InputFile(path, "text", _compression(path)))
            continue
        inside = [file for file in Path(path).rglob("*") if file.is_file()]
        visible = [file for file in inside if not any(part[0] == "." for part in file.relative_to(path).parts)]
        visible.sort(key=lambda file: file.relative_to(path).parts)
        found = {file: _classify(str(file)) for file in visible}
        about = _about_data(found)
        kept = {file: kind for file, kind in found.items() if kind is not None and file not in about}
        others = find_other_splits(Path(path), kept, {file for file, kind in kept.items() if kind.kind != "text"})
        files += [kind for file, kind in kept.items() if file not in others]
        left_out.update({"hidden": len(inside) - len(visible)} if len(visible) < len(inside) else {})
        left_out.update(file.name for file in about)
        left_out.update(f"of the {split} split" for split in others.values())
        left_out.update(file.suffix or "no suffix" for file, kind in found.items() if kind is None)
    if not files:
        there = f" (there: {describe_left_out(left_out)})" if left_out else ""
        raise BadInput(
            f"input {', '.join(paths)}: no file to read{there}; give .jsonl, .parquet or text (.txt, .md ...)"
        )
    return files, left_out


def _advise_another(path: str) -> str:
    """Return what is there where a path is not: the likeliest names of the last directory on the way."""
    folder = Path(path).absolute().parent
    while not folder.is_dir():
        folder = folder.parent
    try:
        names = [entry.name + "/" * entry.is_dir() for entry in os.scandir(folder) if not entry.name.startswith(".")]
    except OSError:
        names = []
    alike = get_close_matches(os.path.basename(path), names, n=3, cutoff=0.3) or sorted(names)[:3]
    return f"in {folder} there is {', '.join(alike) or 'nothing'}"


def describe_left_out(left_out: Counter[str]) -> str:
    """Return what was left out as one line: `3 .png, 1 README.md`."""
    return ", ".join(f"{count} {what}" for what, count in left_out.most_common())


def _about_data(found: dict[Path, InputFile | None]) -> set[Path]:
    """Return the files that tell of a directory's records: Hugging Face's descriptions, and read-mes beside them."""
    about = {file for file in found if file.name in _HF_DESCRIPTIONS}
    about |= {file for file in found if file.suffix == ".arrow" and file.name.startswith("cache-")}  # of `map` alone
    about |= {file for file in found if file.name == "state.json" and file.with_name("dataset_info.json") in about}
    holders: set[Path] = set()  # directories with records in them or below
    for file, kind in found.items():
        if kind is not None and kind.kind != "text" and file not in about:
            holders.update(file.parents)
    for file, kind in found.items():
        is_read_me = file.name.split(".")[0].lower() in _ABOUT_DATA
        if kind is not None and kind.kind == "text" and is_read_me and file.parent in holders:
            about.add(file)
    return about


def _compression(path: str) -> Literal["", ".zst", ".gz"]:
    suffix = Path(path).suffix
    return suffix if suffix in _COMPRESSIONS else ""  # type: ignore[return-value]


def _classify(path: str) -> InputFile | None:
    """Tell from its suffixes what a file holds; None when they do not say."""
    compression = _compression(path)
    suffix = Path(path.removesuffix(compression)).suffix.lower()
    if suffix in _JSONL_SUFFIXES:
        return InputFile(path, "jsonl", compression)
    if suffix == ".parquet" and not compression:
        return InputFile(path, "parquet")
    if suffix == ".arrow" and not compression:
        return InputFile(path, "arrow")
    return InputFile(path, "text", compression) if suffix in _TEXT_SUFFIXES else None


def iter_blocks(files: Iterable[InputFile], text_key: str, block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """Cut the files into blocks of about `block_bytes`, in order; only text files are not read here."""
    waiting: list[InputFile] = []
    num_waiting = 0
    for file in files:
        if file.kind == "text":
            waiting.append(file)
            num_waiting += file.num_bytes
        if waiting and (file.kind != "text" or num_waiting >= block_bytes):
            yield Block(tuple(waiting), 1, b"", num_waiting)
            waiting, num_waiting = [], 0
        if file.kind == "jsonl":
            yield from _jsonl_blocks(file, block_bytes)
        elif file.kind != "text":
            yield from _table_blocks(file, text_key)
    if waiting:
        yield Block(tuple(waiting), 1, b"", num_waiting)


def texts_of(block: Block, text_key: str, *, skip_missing: bool = False) -> Iterator[str | None]:
    """Yield the documents of a block; None for each record without text, which is an error unless `skip_missing`.

    Without text are: null, a line without the key, and bytes in a binary column that are not UTF-8. Raises BadInput
    naming file and line when a record cannot be read as text.
    """
    if block.files[0].kind == "text":
        for file in block.files:
            yield _decode(b"".join(read_pieces(file, BLOCK_BYTES)), file)
    elif isinstance(block.payload, bytes):
        for number, line in enumerate(block.payload.split(b"\n"), start=block.first_record):
            line = line.removeprefix(BOM)  # in front of a file, or of one that was joined to another
            if line.strip():
                yield _parse_line(line, f"{block.files[0].path}:{number}", text_key, skip_missing)
    else:
        for number, value in enumerate(block.payload, start=block.first_record):
            yield _read_cell(value, f"{block.files[0].path}: row {number}", text_key, skip_missing)


def read_pieces(file: InputFile, piece_bytes: int) -> Iterator[bytes]:
    """Yield the decompressed content in pieces of `piece_bytes`, but for the last. Raises BadInput if broken."""
    buffer = bytearray()
    for chunk in _decompressed(file):
        buffer += chunk
        while len(buffer) >= piece_bytes:
            yield bytes(buffer[:piece_bytes])
            del buffer[:piece_bytes]
    if buffer:
        yield bytes(buffer)


def _decompressed(file: InputFile) -> Iterator[bytes]:
    """Yield decompressed chunks of any size; several frames in a row are one content, a cut-off one is an error."""
    with open(file.path, "rb") as stream:
        if not file.compression:
            while chunk := stream.read(BLOCK_BYTES):
                yield chunk
            return
        frame = None
        while chunk := stream.read(BLOCK_BYTES):
            while chunk:
                frame = frame or _new_frame(file.compression)
                try:
                    yield frame.decompress(chunk)
                except Exception as error:  # zlib.error or zstandard.ZstdError, which share no base class
                    raise BadInput(f"input {file.path}: corrupted ({in_one_line(error)}); copy it again") from error
                chunk, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
        if frame is not None:
            raise BadInput(f"input {file.path}: truncated {file.compression} data; copy it again")


def _new_frame(compression: str) -> Any:
    if compression == ".gz":
        return zlib.decompressobj(wbits=31)
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj()


def open_json(file: InputFile, piece_bytes: int) -> tuple[Iterator[bytes], bool]:
    """Return the pieces of a file of JSON, and whether it is an array (it begins with a bracket) rather than lines."""
    pieces = read_pieces(file, piece_bytes)
    first = next(pieces, b"")
    return chain([first], pieces), first.removeprefix(BOM).lstrip()[:1] == b"["


def _jsonl_blocks(file: InputFile, block_bytes: int) -> Iterator[Block]:
    pieces, is_array = open_json(file, block_bytes)
    yield from _array_blocks(file, pieces, block_bytes) if is_array else cut_lines(file, pieces)


def cut_lines(file: InputFile, pieces: Iterator[bytes]) -> Iterator[Block]:
    """Cut the content of a JSONL file into blocks that end at line ends, one for each piece or longer line."""
    rest: list[bytes] = []  # of a line that has not ended yet
    first_line = 1
    for piece in pieces:
        cut = piece.rfind(b"\n") + 1
        if not cut:
            rest.append(piece)
            continue
        payload, rest = b"".join([*rest, piece[:cut]]), [piece[cut:]]
        yield Block((file,), first_line, payload, 0 if file.compression else len(payload))
        first_line += payload.count(b"\n")
    last = b"".join(rest)
    if last or file.compression:  # how far a compressed file was read is known at its end
        yield Block((file,), first_line, last or b"\n", file.num_bytes if file.compression else len(last))


def _array_blocks(file: InputFile, pieces: Iterator[bytes], block_bytes: int) -> Iterator[Block]:
    """Cut a JSON array into blocks of lines, an element each; elements are counted as lines are."""
    lines: list[bytes] = []
    first_element, num_waiting, num_told = 1, 0, 0
    for line in split_array(pieces, f"input {file.path}"):
        lines.append(line)
        num_waiting += len(line) + 1
        if num_waiting >= block_bytes:
            share = 0 if file.compression else num_waiting
            yield Block((file,), first_element, b"\n".join(lines), share)
            first_element, num_waiting, num_told, lines = first_element + len(lines), 0, num_told + share, []
    yield Block((file,), first_element, b"\n".join(lines) or b"\n", max(0, file.num_bytes - num_told))


def _table_blocks(file: InputFile, text_key: str) -> Iterator[Block]:
    """Read the text column of a Parquet or Arrow file a few hundred rows at a time."""
    first_row = 1
    for rows, num_disk_bytes in iter_batches(file, lambda schema: _check_column(file, schema, text_key)):
        yield Block((file,), first_row, tuple(rows.column(0).to_pylist()), num_disk_bytes)
        first_row += rows.num_rows


def _check_column(file: InputFile, schema: Any, text_key: str) -> list[str]:
    """Return the one column to read. Raises BadInput unless there is one of that name which can hold text."""
    columns = {column.name: column.type for column in schema}
    advice = f"a --text-key that would work: {[name for name in columns if _may_be_text(columns[name])]}"
    if text_key not in columns:
        raise BadInput(f"input {file.path}: no column {text_key!r}; {advice}")
    if not _may_be_text(columns[text_key]):
        raise BadInput(f"input {file.path}: column {text_key!r} holds {columns[text_key]}, not text; {advice}")
    return [text_key]


def _may_be_text(kind: Any) -> bool:
    """Return whether a column of this Arrow type can hold text: strings, bytes that may be some, or nothing at all."""
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    tests = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary)
    return any(test(kind) for test in (*tests, types.is_binary_view, types.is_null))


def _read_cell(value: str | bytes | None, where: str, text_key: str, skip_missing: bool) -> str | None:
    """Take the text out of one row of a Parquet column; some writers mark text as bytes."""
    if isinstance(value, str):
        return value
    try:
        if value is not None:
            return value.decode("utf-8")
        problem = f"has no text in column {text_key!r}"
    except UnicodeDecodeError:
        problem = f"has bytes in column {text_key!r} that are not UTF-8"
    if skip_missing:
        return None
    raise BadInput(f"{where} {problem}; drop that row, or leave out all such rows with --skip-missing")


def _parse_line(line: bytes, where: str, text_key: str, skip_missing: bool) -> str | None:
    """Take the text out of one JSON line; None for one without."""
    try:
        record = _JSON.decode(line.decode("utf-8"))
    except RecursionError as error:
        raise BadInput(f"{where}: nested too deep to be read; drop that line") from error
    except ValueError as error:
        raise BadInput(f"{where}: not valid JSON ({error}); each line must be one JSON object") from error
    if not isinstance(record, dict):
        raise BadInput(f'{where}: not a JSON object; each line must be one, like {{{json.dumps(text_key)}: "..."}}')
    if skip_missing and record.get(text_key) is None:
        return None
    if text_key not in record:
        raise BadInput(f"{where}: no key {text_key!r}; a --text-key that may work: {sorted(record)}")
    text = record[text_key]
    if text is None:
        skip = "drop the line, or leave out all lines without text with --skip-missing"
        raise BadInput(f"{where}: the value of {text_key!r} is not a string but null; {skip}")
    if not isinstance(text, str):
        raise BadInput(f"{where}: the value of {text_key!r} is not a string; write it as one or drop the line")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadInput(f"{where}: half a surrogate pair in the text; replace it by \\ufffd") from error
    return text


def _decode(content: bytes, file: InputFile) -> str:
    try:
        return (content if file.keeps_bom else content.removeprefix(BOM)).decode("utf-8")
    except UnicodeDecodeError as error:
        found = "UTF-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else f"not UTF-8 at byte {error.start}"
        raise BadInput(f"input {file.path}: {found}; convert it to UTF-8 or leave it out") from error
