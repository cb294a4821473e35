"""Rows out of every kind of file, by blocks, and a sentence with field, file and line for every broken one."""

from __future__ import annotations

import gzip
import json
import pickle

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from configs.errors import BadInput
from configs.sections.sft import ConversationSource
from trainer.data.chat.rows import iter_blocks, list_chat_files, open_rows, read_block

ROWS = [
    {"prompt": f"ünï {number} \u2028 }},{{", "n": number, "f": 0.5, "deep": [{"a": ["x" * (number % 90), None]}]}
    for number in range(1300)
]  # fmt: skip
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def source(path) -> ConversationSource:
    return ConversationSource(path=str(path))


def read(path) -> list[dict]:
    rows = list(open_rows(source(path), "sft.train[0]"))
    assert [number for _, number, _ in rows] == list(range(len(rows)))
    return [row for _, _, row in rows]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr("trainer.data.chat.rows.BLOCK_BYTES", 1000)


def write_arrow(path, rows, is_stream=True) -> None:
    table = pyarrow.Table.from_pylist(rows)
    with (pyarrow.ipc.new_stream if is_stream else pyarrow.ipc.new_file)(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=500)


@pytest.mark.parametrize(
    "name",
    ["a.jsonl", "a.json", "b.json", "c.json", "b.jsonl", "a.jsonl.gz", "b.json.gz", "a.jsonl.zst", "b.json.zst",
     "a.parquet", "a.arrow", "b.arrow"],
)  # fmt: skip
def test_every_format_gives_the_same_rows(tmp_path, name):
    content = LINES.encode()
    if name.startswith("b.json"):
        content = json.dumps(ROWS, indent=1).encode()
    if name == "c.json":
        content = b"\xef\xbb\xbf" + json.dumps(ROWS, indent=1, ensure_ascii=False).replace("\n", "\r\n").encode()
    if name.endswith(".gz"):
        content = gzip.compress(content)
    if name.endswith(".zst"):
        content = zstandard.compress(content)
    file = tmp_path / name
    if name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
    elif name.endswith(".arrow"):
        write_arrow(str(file), ROWS, is_stream=name[0] == "a")
    else:
        file.write_bytes(content)
    rows = read(file)
    assert rows == ROWS and type(rows[0]["n"]) is int and type(rows[0]["f"]) is float
    blocks = list(iter_blocks(source(file), "f"))
    assert sum(block.num_rows for block in blocks) == len(ROWS) and len(blocks) >= 3
    assert sum(block.num_disk_bytes for block in blocks) == pytest.approx(file.stat().st_size, rel=0.02)
    sent = [pickle.loads(pickle.dumps(block)) for block in reversed(blocks)]  # as a worker gets them, in any order
    assert sorted(number for block in sent for number, _ in read_block(block)) == list(range(len(ROWS)))


def test_blank_lines_are_no_rows_but_count_as_lines(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf\r\n\n{"n": 0}\r\n  \n\n' + b'{"n": 1, "n": 2}\n' * 99 + b"\xef\xbb\xbf" + b"{]")
    blocks = list(iter_blocks(source(file), "f"))
    assert [row["n"] for block in blocks[:-1] for _, row in read_block(block)][:3] == [0, 2, 2]
    with pytest.raises(BadInput, match="^f.path: input .*a.jsonl:105: not valid JSON"):
        list(open_rows(source(file), "f"))


def test_null_in_a_struct_of_a_table_is_no_key(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": False}]},
        {"messages": None},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == rows


def test_a_line_longer_than_blocks_is_one_row(tmp_path):
    row = {"prompt": "x" * 10_000_000, "completion": "y"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n" + LINES)
    (tmp_path / "a.json").write_text(json.dumps([row, *ROWS]))
    assert read(tmp_path / "a.jsonl") == read(tmp_path / "a.json") == [row, *ROWS]


def test_a_folder_gives_its_files_of_the_train_split_and_counts_the_others(tmp_path):
    for name in ("b/train-0.jsonl", "a/train-1.jsonl", "b/test-0.jsonl", "notes.txt", "README.md", "a/x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"name": name}) + "\n")
    found = list(open_rows(source(tmp_path), "f"))
    assert [(number, row["name"]) for _, number, row in found] == [(0, "a/train-1.jsonl"), (0, "b/train-0.jsonl")]
    _, left_out = list_chat_files(source(tmp_path), "f")
    assert left_out == {"of the test split": 1, "notes.txt": 1, ".png": 1, "README.md": 1}


def test_a_folder_that_datasets_saved_is_read(tmp_path):
    write_arrow(str(tmp_path / "data-00000-of-00002.arrow"), ROWS[:700])
    write_arrow(str(tmp_path / "data-00001-of-00002.arrow"), ROWS[700:])
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / name).write_text("{}")
    assert [row for _, _, row in open_rows(source(tmp_path), "f")] == ROWS


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', r"a.jsonl:2: not valid JSON \(Expecting value at column 7\); each line"),
        ("a.json", '{\n "data": []\n}', "a.json:1: not valid JSON .*or the whole file an array of them"),
        ("a.json", '[\n{"a": 1},\n{"a": "x', r"a.json:3: element 2 of its array is not valid JSON \(Unterminated"),
        ("a.json", '[\n{"a": 1},\n{"a":\n NaN}]', "a.json:3: element 2 of its array is not valid JSON .NaN is no JSON"),
        ("a.json", '[[{"a": 1}]]', "a.json:1: element 1 of its array is not a JSON object"),
        ("a.json", '[{"a": 1}\n{"a": 2}]', "a.json:2: not valid JSON: a comma or the end of the array after element 1"),
        ("a.jsonl", '{"a": NaN}', "a.jsonl:1: not valid JSON .NaN is no JSON; write null"),
        ("a.jsonl", '{"a": 1}\n[1]\n', "a.jsonl:2: not a JSON object"),
        ("a.jsonl", '{"a": 1}\n7\n', "a.jsonl:2: not a JSON object"),
        ("a.jsonl", '{"a": ' + "9" * 5000 + "}", r"a.jsonl:1: not valid JSON \(Exceeds the limit"),
        ("a.json", '[{"a": ' + "9" * 5000 + "}]", r"a.json:1: element 1 .*\(Exceeds the limit"),
        ("a.jsonl", '{"a":' * 100_000, "a.jsonl:1: nested too deep"),
        ("a.jsonl", b'{"a": "\xe9"}', "a.jsonl:1: not valid JSON .*utf-8"),
        ("a.parquet", "x", "a.parquet: not a readable Parquet file"),
        ("a.jsonl.gz", "not compressed at all", "a.jsonl.gz: corrupted"),
        ("a.json", "", "a.json: no row in it"),
        ("a.json", "[]", "a.json: no row in it"),
        ("a.txt", "x", r"a.txt: no file of chats \(there: 1 a.txt\); give .json, .jsonl"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_told_with_its_line(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput, match=rf"^sft.train\[0\].path: input .*{sentence}"):
        read(tmp_path / name)


def test_a_path_that_leads_nowhere_is_told(tmp_path):
    with pytest.raises(BadInput, match=r"^sft.validation\[2\].path: input .*gone.json: no such file"):
        list_chat_files(source(tmp_path / "gone.json"), "sft.validation[2]")
