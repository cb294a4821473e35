"""Inputs of preprocessing: the same documents from every format, and a sentence for every broken file."""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter

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


def write_arrow(path, documents, *, is_stream=True) -> None:
    """Write an Arrow file in batches of 500 rows: as `datasets.save_to_disk` does, or in Arrow's file format."""
    import pyarrow

    table = pyarrow.table({"n": range(len(documents)), "text": documents})
    new = pyarrow.ipc.new_stream if is_stream else pyarrow.ipc.new_file
    with new(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=500)


@pytest.mark.parametrize("block_bytes", [10, 1000, 1 << 20])
@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "b.json", "b.json.gz", "a.parquet", "a.arrow"]
)
def test_every_format_gives_the_same_documents(tmp_path, name, block_bytes):
    content = as_jsonl(DOCUMENTS)
    if name.startswith("b.json"):
        content = json.dumps([{"text": text, "n": [{}]} for text in DOCUMENTS], indent=1, ensure_ascii=False).encode()
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
    elif name.endswith(".arrow"):
        write_arrow(file, DOCUMENTS)
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
    assert list_inputs([str(tmp_path)])[1] == {".png": 1, "hidden": 1}


@pytest.mark.parametrize("name", ["pipe.jsonl", "/dev/zero"])
def test_what_is_no_file_is_refused_by_name(tmp_path, name):
    """Nobody may ever write into the pipe, and the device has no end."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(BadInput, match=f"input .*{name}: a (pipe|device), .*; write it to a file first"):
        list_inputs([str(tmp_path / name)])


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
        (b'{"text": 7}', "'text' is not a string"),
        (b"[" * 100_000, "nested too deep"),
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


BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.yaml", "a.jsonl", "a.txt.gz", "a.jsonl.zst"])
def test_a_byte_order_mark_is_no_text(tmp_path, name):
    content = b'{"text": "one"}\n' if "jsonl" in name else b"one"
    joined = BOM + content + (BOM + content if "jsonl" in name else b"")  # as `cat a.jsonl b.jsonl` makes
    compress = {"gz": gzip.compress, "zst": zstandard.compress}.get(name.split(".")[-1], bytes)
    (tmp_path / name).write_bytes(compress(joined))
    assert read([tmp_path / name]) == ["one"] * joined.count(BOM)


def test_a_mark_alone_is_a_blank_line_and_utf_16_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(BOM + b'\n{"text": "one"}')
    assert read([tmp_path / "a.jsonl"]) == ["one"]
    (tmp_path / "a.txt").write_bytes("one".encode("utf-16"))
    with pytest.raises(BadInput, match="a.txt: UTF-16; convert it to UTF-8"):
        read([tmp_path / "a.txt"])


def test_whole_numbers_of_any_length_are_json(tmp_path):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "one", "n": {"9" * 5000}, "m": [-{"1" * 9000}]}}\n')
    assert read([tmp_path / "a.jsonl"]) == ["one"]


def write_parquet(file, **columns) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), file)


def test_a_downloaded_dataset_gives_its_records_alone(tmp_path):
    for name in ("README.md", "LICENSE.txt", "data/README.md", ".gitattributes", ".cache/huggingface/x.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("tells of the data")
    for name in ("dataset_infos.json", "data/dataset_info.json", "data/state.json", "dataset_dict.json"):
        (tmp_path / name).write_text('{\n "default": {}\n}')
    write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", text=["one", "two"])
    (tmp_path / "data" / "picture.png").write_bytes(b"x")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "README.md").write_text("a document: no records beside it")
    assert read([tmp_path]) == ["one", "two", "a document: no records beside it"]
    left_out = list_inputs([str(tmp_path)])[1]
    assert left_out == {
        "README.md": 2, "LICENSE.txt": 1, "dataset_infos.json": 1, "dataset_info.json": 1, "state.json": 1,
        "dataset_dict.json": 1, ".png": 1, "hidden": 2,
    }  # fmt: skip
    assert read([tmp_path / "README.md"]) == ["tells of the data"]  # named outright


def test_a_tree_of_texts_keeps_its_read_me_and_what_was_there_instead_is_told(tmp_path):
    for name in ("README.md", "code/a.py", "code/README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read([tmp_path]) == ["README.md", "code/README.md", "code/a.py"]
    (tmp_path / "saved").mkdir()
    for name in ("data-00000.tar", "dataset_info.json"):
        (tmp_path / "saved" / name).write_text("{}")
    with pytest.raises(BadInput, match=r"no file to read \(there: .*1 .tar"):
        read([tmp_path / "saved"])


@pytest.mark.parametrize("kind", ["binary", "large_binary", "binary_view", "string_view", "large_string", "dictionary"])
def test_text_in_columns_of_other_types_is_text(tmp_path, kind):
    import pyarrow

    made = {"dictionary": lambda: pyarrow.dictionary(pyarrow.int32(), pyarrow.string())}
    column = pyarrow.array(["one", "zwölf"]).cast(made.get(kind, getattr(pyarrow, kind, None))())
    write_parquet(tmp_path / "a.parquet", text=column)
    assert read([tmp_path / "a.parquet"]) == ["one", "zwölf"]


def test_rows_without_text_are_skipped_and_counted_if_asked(tmp_path):
    import pyarrow

    write_parquet(tmp_path / "a.parquet", text=pyarrow.array(["one", None, ""]))
    write_parquet(tmp_path / "b.parquet", text=pyarrow.array([b"two", b"\xff\xfe", None], pyarrow.binary()))
    write_parquet(tmp_path / "c.parquet", text=pyarrow.nulls(2))
    (tmp_path / "d.jsonl").write_text('{"text": null}\n{"body": "x"}\n{"text": "three"}\n')
    files, _ = list_inputs([str(tmp_path)])
    found = [text for block in iter_blocks(files, "text") for text in texts_of(block, "text", skip_missing=True)]
    assert found == ["one", None, "", "two", None, None, None, None, None, None, "three"]
    for name, sentence in (("a", "row 2 has no text"), ("b", "row 2 has bytes .* not UTF-8"), ("c", "row 1 has no")):
        with pytest.raises(BadInput, match=f"{name}.parquet: {sentence}.*--skip-missing"):
            read([tmp_path / f"{name}.parquet"])


def test_columns_that_hold_no_text_are_named_by_type(tmp_path):
    write_parquet(tmp_path / "a.parquet", text=[[1], [2]], body=["x", "y"], n=[1, 2])
    with pytest.raises(BadInput, match=r"column 'text' holds list<.*not text; .*would work: \['body'\]"):
        read([tmp_path / "a.parquet"])


def test_a_json_array_is_read_as_its_objects(tmp_path):
    write = (tmp_path / "a.json").write_text
    write('\ufeff [\r\n {"text":\n"one"} ,{"text": "two\\nlines", "n": 1}\n]\n')
    assert read([tmp_path / "a.json"]) == ["one", "two\nlines"]
    write("[ ]")
    assert read([tmp_path / "a.json"]) == []
    write('[{"text": "one"}, {"text": null}, {"body": 1}]')
    files, _ = list_inputs([str(tmp_path / "a.json")])
    blocks = list(iter_blocks(files, "text", 1000))
    assert [text for block in blocks for text in texts_of(block, "text", skip_missing=True)] == ["one", None, None]
    write("[" + ",".join(json.dumps({"text": text}) for text in DOCUMENTS) + "]")
    blocks = list(iter_blocks(files, "text", 1000))
    assert len(blocks) > 20 and sum(block.num_disk_bytes for block in blocks) == (tmp_path / "a.json").stat().st_size
    assert sum(block.payload.count(b"\n") + 1 for block in blocks[:9]) + 1 == blocks[9].first_record


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('[{"text": "one"}, 3]', "a.json:1: element 2 of its array is not a JSON object"),
        (
            '[{"text": "one"} {"text": "two"}]',
            "a.json:1: not valid JSON: a comma or the end of the array after element 1",
        ),
        ('[{"text": "one"}', "a.json:1: not valid JSON: a comma or the end"),
        ('[{"text": "one"},]', "element 2 of its array is not a JSON object"),
        ('[{"text": "one', "element 1 of its array is not valid JSON .*Unterminated string"),
        ('[{"text": one}]', "element 1 of its array is not valid JSON"),
        ('[{"text": "one"}]\n[]', "a.json:2: something follows the array"),
        ('[{"text": "one"}, {"body": 1}]', "a.json:2: no key 'text'"),
        ('[{"text": ' + "[" * 100_000 + "]" * 100_000 + "}]", "element 1 of its array is nested too deep"),
    ],
)
def test_what_is_wrong_with_a_json_array_is_told(tmp_path, text, sentence):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(BadInput, match=sentence):
        read([tmp_path / "a.json"], block_bytes=100)


def test_a_json_array_that_is_not_utf_8_is_told(tmp_path):
    (tmp_path / "a.json").write_bytes(b'[{"text": "\xff"}]')
    with pytest.raises(BadInput, match="a.json: not UTF-8"):
        read([tmp_path / "a.json"])


def test_a_folder_that_datasets_saved_gives_its_train_split_without_caches(tmp_path):
    for split, documents in (("train", ["one", "two"]), ("test", ["no"]), ("holdout", ["nor this"])):
        (tmp_path / split).mkdir()
        write_arrow(tmp_path / split / "data-00000-of-00001.arrow", documents)
        write_arrow(tmp_path / split / "cache-0123456789abcdef.arrow", ["mapped"])
        for name in ("state.json", "dataset_info.json"):
            (tmp_path / split / name).write_text("{}")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test", "holdout"]}')
    assert read([tmp_path]) == ["one", "two"]
    left_out = list_inputs([str(tmp_path)])[1]
    assert left_out["of the test split"] == left_out["of the holdout split"] == 1
    assert left_out["cache-0123456789abcdef.arrow"] == 3
    write_arrow(tmp_path / "a.arrow", DOCUMENTS, is_stream=False)
    assert read([tmp_path / "a.arrow"]) == DOCUMENTS
    with pytest.raises(BadInput, match=r"no column 'body'; a --text-key that would work: \['text'\]"):
        read([tmp_path / "a.arrow"], "body")
    (tmp_path / "b.arrow").write_bytes((tmp_path / "a.arrow").read_bytes()[:300])
    with pytest.raises(BadInput, match="b.arrow: not a readable Arrow file"):
        read([tmp_path / "b.arrow"])


SHARD = "00000-of-00001.parquet"


@pytest.mark.parametrize(
    ("train", "others"),
    [
        ([f"data/train-{SHARD}"], {f"data/test-{SHARD}": "test", f"data/validation-{SHARD}": "validation"}),
        ([f"data/train_sft-{SHARD}", f"data/train_gen-{SHARD}"], {f"data/test_sft-{SHARD}": "test"}),
        (["en/train.jsonl", "train1.jsonl.gz"], {"en/dev.jsonl": "validation", "my eval.jsonl": "test"}),
        (["train/00.jsonl", "train/test_of_time.jsonl", "my_train_file.json"], {"val.jsonl": "validation"}),
        ([f"data/train-{SHARD}", f"part-{SHARD}"], {f"data/unsupervised-{SHARD}": "unsupervised"}),
        ([f"a/train_sft-{SHARD}", "b.jsonl"], {f"a/held_out-{SHARD}": "held_out", "TEST.jsonl": "test"}),
        ([f"part-{SHARD}", f"other-{SHARD}"], {}),
        (["training/a.jsonl", "training/b.jsonl", "other.jsonl"], {"evaluation/a.jsonl": "test"}),
        (["latest.jsonl", "validated.jsonl", "tests.jsonl"], {}),
        (["test.jsonl", "dev.jsonl"], {}),  # nothing is of the train split
        (["train.py", "test_train.py", "a.txt", "test.txt"], {}),  # no records
    ],
)
def test_of_a_dataset_with_splits_the_train_split_is_read(tmp_path, train, others):
    for name in (*train, *others):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    files, left_out = list_inputs([str(tmp_path)])
    assert sorted(file.path.removeprefix(f"{tmp_path}/") for file in files) == sorted(train)
    assert left_out == Counter(f"of the {split} split" for split in others.values())
    for name in others:  # the way to read them all the same
        assert [file.path for file in list_inputs([str(tmp_path / name)])[0]] == [str(tmp_path / name)]


CARD = """---
license: mit
configs:
- config_name: en
  data_files:
  - split: train
    path: "en/*.jsonl"
  - split: holdout
    path: ["en/held/**", "[!a-y].jsonl"]
- config_name: de
  data_files: {train: de/test, dev: "**/v?.txt"}
- config_name: fr
  data_files: fr.jsonl
---
# A card
"""


def test_a_datasets_card_says_what_is_of_which_split(tmp_path):
    train = ["de/test/a.jsonl", "en/a.jsonl", "en/test.jsonl", "fr.jsonl", "z/unlisted.jsonl"]
    others = {"de/test/v1.txt": "", "en/held/b/c.jsonl": "holdout", "v2.txt": "validation", "z.jsonl": "holdout"}
    others["z/test.jsonl"] = "test"
    for name in (*train, *others):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "README.md").write_text(CARD)
    files, left_out = list_inputs([str(tmp_path)])
    assert [file.path.removeprefix(f"{tmp_path}/") for file in files] == sorted([*train, "de/test/v1.txt"])
    expected = Counter(f"of the {split} split" for split in others.values() if split)
    assert left_out == expected + Counter({"README.md": 1})
    for card in ("---\n- a\n---\n", "---\nconfigs: {a: 1}\n---\n", "---\nconfigs: [{data_files: [{path: 3}]}]\n---\n"):
        (tmp_path / "README.md").write_text(card)
        assert len(list_inputs([str(tmp_path)])[0]) >= 6
