"""Inputs of preprocessing: the same documents from every format, and a sentence for every broken file."""

from __future__ import annotations

import gzip
import json

import pytest
import zstandard

from configs.errors import BadInput
from trainer.data.making.documents import InputFile, iter_blocks, list_inputs, read_pieces, texts_of

DOCUMENTS = [f"document {number} ünï\n" * (number % 7 + 1) for number in range(1300)]


def read(paths, text_key="text", block_bytes=1000) -> list[str]:
    files, _ = list_inputs([str(path) for path in paths])
    return [text for block in iter_blocks(files, text_key, block_bytes) for text in texts_of(block, text_key)]


def as_jsonl(documents) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()


@pytest.mark.parametrize("block_bytes", [10, 1000, 1 << 20])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.parquet"])
def test_every_format_gives_the_same_documents(tmp_path, name, block_bytes):
    content = as_jsonl(DOCUMENTS)
    file = tmp_path / name
    if name.endswith(".gz"):  # two members, two frames: as `cat a b > c` makes
        content = gzip.compress(content[:5000]) + gzip.compress(content[5000:])
    if name.endswith(".zst"):
        compressor = zstandard.ZstdCompressor()
        content = compressor.compress(content[:5000]) + compressor.compress(content[5000:])
    if name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": DOCUMENTS, "n": range(len(DOCUMENTS))}), file)
    else:
        file.write_bytes(content)
    assert read([file], block_bytes=block_bytes) == DOCUMENTS


def test_a_file_without_a_last_line_end_and_blank_lines(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\n{"text": "one"}\r\n\n  \n{"text": "two"}')
    assert read([tmp_path / "a.jsonl"]) == ["one", "two"]


def test_directories_are_read_in_the_order_of_their_paths(tmp_path):
    for name in ("b.txt", "a/z.py", "a/b.md", "c.jsonl", "picture.png", ".hidden.txt", "d.txt.zst"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "c.jsonl").write_text('{"text": "c.jsonl"}')
    (tmp_path / "d.txt.zst").write_bytes(zstandard.compress(b"d.txt.zst"))
    assert read([tmp_path]) == ["a/b.md", "a/z.py", "b.txt", "c.jsonl", "d.txt.zst"]
    assert list_inputs([str(tmp_path)])[1] == {".png": 1}


def test_blocks_know_their_lines_and_add_up(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(as_jsonl(DOCUMENTS))
    blocks = list(iter_blocks([InputFile(str(file), "jsonl")], "text", 1000))
    assert len(blocks) > 20 and sum(block.num_disk_bytes for block in blocks) == file.stat().st_size
    lines = file.read_bytes().split(b"\n")
    for block in blocks:
        assert block.payload.startswith(lines[block.first_record - 1])


@pytest.mark.parametrize(
    "line, sentence",
    [
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[1]", "not a JSON object"),
        (b'{"body": "x"}', r"no key 'text'; .*\['body'\]"),
        (b'{"text": null}', "'text' is not a string"),
        (b'{"text": "\\ud800"}', "surrogate"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, sentence):
    file = tmp_path / "a.jsonl"
    file.write_bytes(as_jsonl(DOCUMENTS[:700]) + line + b"\n" + as_jsonl(DOCUMENTS[:10]))
    with pytest.raises(BadInput, match=rf"a.jsonl:701: {sentence}|a.jsonl:701: .*{sentence}"):
        read([file])


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_broken_compression_is_named(tmp_path, suffix):
    content = as_jsonl(DOCUMENTS)
    whole = gzip.compress(content) if suffix == "gz" else zstandard.compress(content)
    file = tmp_path / f"a.jsonl.{suffix}"
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInput, match=f"a.jsonl.{suffix}: truncated"):
        read([file])
    file.write_bytes(b"not compressed at all")
    with pytest.raises(BadInput, match=f"a.jsonl.{suffix}: corrupted"):
        read([file])


def test_bad_parquet_and_text_are_named(tmp_path):
    import pyarrow
    import pyarrow.parquet

    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), file)
    with pytest.raises(BadInput, match="a.parquet: row 2 has no text"):
        read([file])
    with pytest.raises(BadInput, match=r"no column 'body'; .*\['text'\]"):
        read([file], text_key="body")
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(BadInput, match="a.parquet: not a readable Parquet file"):
        read([file])
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(BadInput, match="latin.txt: not UTF-8 at byte 3"):
        read([tmp_path / "latin.txt"])
    with pytest.raises(BadInput, match="missing: no such file"):
        read([tmp_path / "missing"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="no file to read"):
        read([tmp_path / "empty"])


def test_pieces_have_the_size_asked_for(tmp_path):
    file = tmp_path / "a.txt.zst"
    file.write_bytes(zstandard.compress(b"x" * 1050))
    assert [len(piece) for piece in read_pieces(InputFile(str(file), "text", ".zst"), 100)] == [100] * 10 + [50]
