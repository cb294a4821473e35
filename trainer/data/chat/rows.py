"""Rows of the files behind a source of conversations, as JSON gives them, by blocks that many workers can share.

Torch-free. Knows nothing of what the rows hold.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from configs.errors import BadInput, in_one_line
from configs.sections.sft import ConversationSource
from trainer.data.making.documents import (
    BLOCK_BYTES,
    BOM,
    InputFile,
    cut_lines,
    describe_left_out,
    list_inputs,
    open_json,
)
from trainer.data.making.json_array import parse_array
from trainer.data.making.tables import iter_batches

_FORMATS = "give .json, .jsonl (both also as .gz or .zst), .parquet, or a folder of these"


@dataclass(frozen=True)
class RowBlock:
    """Some rows of one file, in order, small enough to send to a worker, which makes objects of them (`read_block`)."""

    field: str
    """Config field that holds the source, or the option that is its path, for messages: `sft.train[0]`."""
    path: str
    first_row: int
    """Number of the first row in its file, from 0; blank lines are no rows."""
    num_rows: int
    first_line: int
    """Number of its line, from 1; of lines alone."""
    kind: Literal["lines", "objects", "table"]
    payload: bytes | tuple[dict[str, Any], ...]
    """Whole lines of JSON, objects read out of an array, or an Arrow stream."""
    num_disk_bytes: int
    """Of the file, for progress; the blocks of a file add up to its size, but for rounding."""


def list_chat_files(source: ConversationSource, field: str) -> tuple[list[InputFile], Counter[str]]:
    """Find the files of a source, in order; of a folder with splits, those of the train split.

    Returns the files and, by suffix or name, how many of a folder were left out (`documents.list_inputs`). Raises
    BadInput, naming `field`, where there is nothing to read.
    """
    with _named(field):
        files, left_out = list_inputs([source.path])
        chats = [file for file in files if file.kind != "text"]
        left_out.update(file.path.rpartition("/")[2] for file in files if file.kind == "text")
        if not chats:
            there = f" (there: {describe_left_out(left_out)})"
            raise BadInput(f"input {source.path}: no file of chats{there}; {_FORMATS}")
        return chats, left_out


def iter_blocks(source: ConversationSource, field: str) -> Iterator[RowBlock]:
    """Cut the files of a source into blocks of about a megabyte, in order, whatever reads them later.

    Lines and tables are cut here and read by `read_block`; a JSON array must be read to be cut, so its blocks hold
    objects. Raises BadInput, naming `field`, for files that cannot be read, and where there is no row in any of them.
    """
    num_rows = 0
    for block in _cut(source, field):
        num_rows += block.num_rows
        yield block
    if not num_rows:
        raise BadInput(f"{_path_field(field)}: input {source.path}: no row in it; give a file that has some")


def _cut(source: ConversationSource, field: str) -> Iterator[RowBlock]:
    files, _ = list_chat_files(source, field)
    with _named(field):
        for file in files:
            if file.kind != "jsonl":
                yield from _table_blocks(file, field)
                continue
            pieces, is_array = open_json(file, BLOCK_BYTES)
            yield from _array_blocks(file, pieces, field) if is_array else _line_blocks(file, pieces, field)


def read_block(block: RowBlock) -> list[tuple[int, dict[str, Any]]]:
    """Read the rows of a block, each with its number in its file, from 0.

    Of keys that a JSON object has twice the last counts, as everywhere in Python. In tables, null inside a struct
    means that there is no such key: Arrow gives every row the keys of all.
    Raises BadInput, naming field, file and line, for what is no JSON object.
    """
    if isinstance(block.payload, tuple):
        return list(enumerate(block.payload, start=block.first_row))
    with _named(block.field):
        if block.kind == "table":
            return list(enumerate(_read_table(block), start=block.first_row))
        rows: list[tuple[int, dict[str, Any]]] = []
        for number, line in enumerate(block.payload.split(b"\n"), start=block.first_line):
            if _is_row(line):
                rows.append((block.first_row + len(rows), _read_line(line, f"input {block.path}:{number}")))
        return rows


def open_rows(source: ConversationSource, field: str) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yield file, number in it from 0, and content of every row of a source, in order. Raises BadInput."""
    for block in iter_blocks(source, field):
        for number, row in read_block(block):
            yield block.path, number, row


@contextmanager
def _named(field: str) -> Iterator[None]:
    """Put the field in front of what is wrong with its files."""
    try:
        yield
    except BadInput as error:
        raise BadInput(f"{_path_field(field)}: {error}") from error


def _path_field(field: str) -> str:
    """Return what names the path of a source: a field of the config, or an option of a tool, which is the path."""
    return field if field.startswith("--") else f"{field}.path"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON; write null for what is missing")


_JSON = json.JSONDecoder(parse_constant=_refuse_constant)


def _is_row(line: bytes) -> bool:
    """Return whether a line holds anything; a byte order mark alone is nothing."""
    return bool(line.removeprefix(BOM).strip())


def _line_blocks(file: InputFile, pieces: Iterator[bytes], field: str) -> Iterator[RowBlock]:
    first_row = 0
    for lines in cut_lines(file, pieces):
        payload, first_line, share = lines.payload, lines.first_record, lines.num_disk_bytes
        assert isinstance(payload, bytes)
        num_rows = sum(map(_is_row, payload.split(b"\n")))
        yield RowBlock(field, file.path, first_row, num_rows, first_line, "lines", payload, share)
        first_row += num_rows


def _array_blocks(file: InputFile, pieces: Iterator[bytes], field: str) -> Iterator[RowBlock]:
    rows: list[dict[str, Any]] = []
    first_row, num_waiting, num_told = 0, 0, 0
    for row, text in parse_array(pieces, f"input {file.path}", _JSON):
        rows.append(row)
        num_waiting += len(text) + 1
        if num_waiting >= BLOCK_BYTES:
            share = 0 if file.compression else num_waiting
            yield RowBlock(field, file.path, first_row, len(rows), 1, "objects", tuple(rows), share)
            first_row, num_waiting, num_told, rows = first_row + len(rows), 0, num_told + share, []
    share = max(0, file.num_bytes - num_told)
    yield RowBlock(field, file.path, first_row, len(rows), 1, "objects", tuple(rows), share)


def _table_blocks(file: InputFile, field: str) -> Iterator[RowBlock]:
    import pyarrow

    first_row = 0
    for batch, share in iter_batches(file, lambda schema: schema.names):
        stream = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(stream, batch.schema) as writer:
            writer.write_batch(batch)
        payload = stream.getvalue().to_pybytes()
        yield RowBlock(field, file.path, first_row, batch.num_rows, 1, "table", payload, share)
        first_row += batch.num_rows


def _read_table(block: RowBlock) -> list[dict[str, Any]]:
    import pyarrow

    try:
        rows = pyarrow.ipc.open_stream(block.payload).read_all().to_pylist()
    except (pyarrow.ArrowException, ValueError) as error:  # text that is no UTF-8, a struct with a name twice
        where = f"input {block.path}: row {block.first_row}, or one soon after it,"
        raise BadInput(f"{where} cannot be read ({in_one_line(error)}); write the file again without it") from error
    return [{name: _without_nulls(value) for name, value in row.items()} for row in rows]


def _without_nulls(value: Any) -> Any:
    """Take the keys without a value out of the structs in a cell."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _read_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = _JSON.decode(line.removeprefix(BOM).decode())
    except RecursionError as error:
        raise BadInput(f"{where}: nested too deep to be read; drop that line") from error
    except ValueError as error:  # of JSON, of UTF-8, or a number of more than 4300 digits
        advice = "each line must be one JSON object, or the whole file an array of them"
        reason = in_one_line(error)
        if isinstance(error, json.JSONDecodeError):
            reason = f"{error.msg.removesuffix(' at')} at column {error.colno}"
        raise BadInput(f"{where}: not valid JSON ({reason}); {advice}") from error
    if not isinstance(row, dict):
        raise BadInput(f"{where}: not a JSON object, as each line must be; mend or drop that line")
    return row
