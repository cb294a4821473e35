"""Rows of Parquet and Arrow files, some hundred at a time. Torch-free; knows nothing of what the columns mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from configs.errors import BadInput, in_one_line

if TYPE_CHECKING:
    from trainer.data.making.documents import InputFile

_ROWS = 512


def iter_batches(file: InputFile, choose: Callable[[Any], list[str]]) -> Iterator[tuple[Any, int]]:
    """Yield Arrow record batches of at most 512 rows, in order, each with its share of the bytes on disk.

    `choose` is given the file's Arrow schema, may refuse it, and returns the columns to read. Raises BadInput.
    """
    import pyarrow

    kind, read = ("Parquet", _parquet) if file.kind == "parquet" else ("Arrow", _arrow)
    try:
        yield from read(file, choose)
    except (pyarrow.ArrowException, OSError) as error:
        reason = f"not a readable {kind} file ({in_one_line(error)}); copy it again"
        raise BadInput(f"input {file.path}: {reason}") from error


def _parquet(file: InputFile, choose: Callable[[Any], list[str]]) -> Iterator[tuple[Any, int]]:
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(file.path)
    num_rows = table.metadata.num_rows
    for rows in table.iter_batches(batch_size=_ROWS, columns=choose(table.schema_arrow)):
        yield rows, file.num_bytes * rows.num_rows // max(num_rows, 1)


def _arrow(file: InputFile, choose: Callable[[Any], list[str]]) -> Iterator[tuple[Any, int]]:
    """Read a stream, as `datasets` saves it, or Arrow's file format."""
    import pyarrow

    with pyarrow.memory_map(file.path) as source:
        is_stream = source.read(6) != b"ARROW1"
        source.seek(0)
        table = pyarrow.ipc.open_stream(source) if is_stream else pyarrow.ipc.open_file(source)
        places = [table.schema.names.index(name) for name in choose(table.schema)]
        batches = iter(table) if is_stream else map(table.get_batch, range(table.num_record_batches))
        num_told = 0
        for batch in batches:
            share = max(0, source.tell() - num_told) if is_stream else file.num_bytes // table.num_record_batches
            num_told += share
            columns = batch.select(places)
            for start in range(0, batch.num_rows, _ROWS):
                yield columns.slice(start, _ROWS), share if start == 0 else 0
