"""Preprocessing: the same bytes whatever the workers or interruptions, readable by Megatron, honest about mistakes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tools.preprocess_data import main, preprocess
from trainer.data.making.documents import list_inputs
from trainer.data.making.workers import Recipe
from trainer.data.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]
SUFFIXES = (".bin", ".idx", ".meta.json")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tokenizer_directory, jsonl) -> str:
    """The dataset of one run with one worker."""
    prefix = str(tmp_path_factory.mktemp("finished") / "data")
    assert main([str(jsonl), "--tokenizer", tokenizer_directory, "--out", prefix, "--workers", "1"]) == 0
    return prefix


def content(prefix: str) -> list[bytes]:
    return [Path(prefix + suffix).read_bytes() for suffix in SUFFIXES]


def texts(jsonl: Path) -> list[str]:
    found = [json.loads(line)["text"] for line in jsonl.read_text(encoding="utf-8").splitlines()]
    return [text for text in found if text]


def test_megatron_reads_the_documents_in_order(finished, jsonl, tokenizer_directory):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    tokenizer = load_tokenizer(tokenizer_directory)
    dataset = IndexedDataset(finished)
    expected = [[*tokenizer.encode(text), tokenizer.eod_id] for text in texts(jsonl)]
    assert [dataset[number].tolist() for number in range(len(dataset))] == expected
    assert dataset.document_indices.tolist() == list(range(len(expected) + 1))
    assert dataset.index.dtype == np.uint16


def test_meta_says_what_was_made(finished, jsonl, tokenizer_directory):
    meta = json.loads(Path(finished + ".meta.json").read_text())
    tokenizer = load_tokenizer(tokenizer_directory)
    assert meta["vocabulary_hash"] == tokenizer.vocabulary_hash and meta["vocab_size"] == 340
    assert meta["num_documents"] == len(texts(jsonl)) == 360 and meta["num_empty_documents"] == 40
    assert meta["num_tokens"] * 2 == Path(finished + ".bin").stat().st_size
    assert [source["num_bytes"] for source in meta["sources"]] == [jsonl.stat().st_size]
    assert not Path(finished + ".parts").exists()


def test_two_workers_and_small_parts_give_the_same_bytes(finished, jsonl, tokenizer_directory, tmp_path):
    files, _ = list_inputs([str(jsonl)])
    for name, workers, seconds in (("one", 1, 100.0), ("two", 2, 0.0)):
        options = {"num_workers": workers, "part_seconds": seconds, "block_bytes": 4096}
        preprocess(files, Recipe(tokenizer_directory), str(tmp_path / name), **options)
    one, two = content(str(tmp_path / "one")), content(str(tmp_path / "two"))
    assert one == two and one[:2] == content(finished)[:2]


KILLED = """
import sys, time
from tools import preprocess_data
from trainer.data.making.documents import list_inputs
from trainer.data.making.parts import PartStore
from trainer.data.making.workers import Recipe

if __name__ == "__main__":
    finish = PartStore.finish_part
    def slowly(store):
        finish(store)
        print(len(store.parts), flush=True)
        time.sleep(0.2)
    PartStore.finish_part = slowly
    files, recipe = list_inputs([sys.argv[1]])[0], Recipe(sys.argv[2])
    preprocess_data.preprocess(files, recipe, sys.argv[3], block_bytes=4096, part_seconds=0.0)
"""


def test_a_killed_run_goes_on_to_the_same_bytes(finished, jsonl, tokenizer_directory, tmp_path, capsys):
    prefix = str(tmp_path / "data")
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), str(jsonl), tokenizer_directory, prefix]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "3":
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not any(os.path.exists(prefix + suffix) for suffix in SUFFIXES)
    files, _ = list_inputs([str(jsonl)])
    preprocess(files, Recipe(tokenizer_directory), prefix, num_workers=2, block_bytes=4096, part_seconds=0.0)
    assert "going on after" in capsys.readouterr().out
    assert content(prefix)[:2] == content(finished)[:2]
    assert not os.path.exists(prefix + ".parts")


def test_parts_of_another_run_and_damaged_parts_are_refused(jsonl, tokenizer_directory, tmp_path, capsys):
    prefix, parts = str(tmp_path / "data"), tmp_path / "data.parts"
    parts.mkdir()
    (parts / "manifest.json").write_text(json.dumps({"fingerprint": "other", "parts": []}))
    command = [str(jsonl), "--tokenizer", tokenizer_directory, "--out", prefix, "--workers", "1"]
    assert main(command) == 2
    assert f"{parts}: left by a run with other inputs" in capsys.readouterr().err
    (parts / "manifest.json").write_text("{")
    assert main(command) == 2
    assert "manifest.json: not readable" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.parts"]


def test_the_same_again_does_nothing_and_another_is_refused(finished, jsonl, tokenizer_directory, tmp_path, capsys):
    before = content(finished)
    command = [str(jsonl), "--tokenizer", tokenizer_directory, "--out", finished, "--workers", "1"]
    assert main(command) == 0
    assert "already complete" in capsys.readouterr().out
    other = tmp_path / "other.txt"
    other.write_text("something else")
    assert main([str(other), *command[1:]]) == 2
    assert "other inputs or settings" in capsys.readouterr().err
    assert content(finished) == before
    stranger = tmp_path / "stranger"
    Path(f"{stranger}.bin").write_bytes(b"precious")
    assert main([str(jsonl), "--tokenizer", tokenizer_directory, "--out", str(stranger), "--workers", "1"]) == 2
    assert "not made here" in capsys.readouterr().err and Path(f"{stranger}.bin").read_bytes() == b"precious"


def test_verify_accepts_good_data_and_finds_a_changed_token(
    finished, jsonl, tokenizer_directory, tmp_path, capsys, monkeypatch
):
    copy = str(tmp_path / "copy")
    for suffix in SUFFIXES:
        shutil.copy(finished + suffix, copy + suffix)
    command = [str(jsonl), "--tokenizer", tokenizer_directory, "--out", copy, "--workers", "1", "--verify"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "verified hashes, 360 documents, 8 of them tokenized again; 8 of those decode to exactly" in out
    data = bytearray(Path(copy + ".bin").read_bytes())
    data[0] ^= 1
    Path(copy + ".bin").write_bytes(data)
    assert main(command) == 2
    assert "copy.bin: not the SHA-256" in capsys.readouterr().err
    meta = json.loads(Path(copy + ".meta.json").read_text())
    from trainer.data.making.parts import hash_file

    Path(copy + ".meta.json").write_text(json.dumps(meta | {"bin_sha256": hash_file(copy + ".bin")}))
    assert main(command) == 2
    assert "document 0 is not what its input gives" in capsys.readouterr().err


def test_bad_input_is_one_sentence_and_writes_no_dataset(jsonl, tokenizer_directory, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"txt": "misspelt"}\n')
    prefix = str(tmp_path / "data")
    assert main([str(bad), "--tokenizer", tokenizer_directory, "--out", prefix, "--workers", "2"]) == 2
    assert capsys.readouterr().err == f"error: {bad}:2: no key 'text'; a --text-key that may work: ['txt']\n"
    assert main([str(jsonl), "--tokenizer", str(tmp_path), "--out", prefix]) == 2
    assert "no tokenizer.json" in capsys.readouterr().err
    assert main([str(jsonl), "--tokenizer", tokenizer_directory, "--out", prefix, "--workers", "0"]) == 2
    assert "--workers: 0" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl"]


def test_only_empty_documents_are_refused(tokenizer_directory, tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    inputs = [str(tmp_path / "empty.jsonl"), "--tokenizer", tokenizer_directory, "--out", str(tmp_path / "data")]
    assert main([*inputs, "--workers", "1"]) == 2
    assert "no text at all" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.jsonl"]


def test_help_needs_neither_torch_nor_tokenizers():
    started = time.monotonic()
    hidden = "import sys; sys.modules |= dict(torch=None, tokenizers=None); "
    code = hidden + "from tools.preprocess_data import main; main(['-h'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--verify" in done.stdout and time.monotonic() - started < 5


def test_records_without_text_are_counted_in_the_summary_and_the_meta_file(tokenizer_directory, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": null}\n{}\n{"text": ""}\n')
    command = [str(tmp_path / "a.jsonl"), "--tokenizer", tokenizer_directory, "--out", str(tmp_path / "data")]
    assert main(command) == 2
    assert "a.jsonl:2: the value of 'text' is not a string but null" in capsys.readouterr().err
    assert main([*command, "--skip-missing", "--verify"]) == 0
    assert "1 documents (1 empty ones left out, 2 records without text left out)" in capsys.readouterr().out
    meta = json.loads((tmp_path / "data.meta.json").read_text())
    assert (meta["num_documents"], meta["num_empty_documents"], meta["num_missing_documents"]) == (1, 1, 2)


def test_a_small_input_starts_no_processes_and_no_slow_imports(jsonl, tokenizer_directory, tmp_path):
    hidden = "import sys; sys.modules |= dict(torch=None, megatron=None, transformers=None)\n"
    code = hidden + (
        "import concurrent.futures\n"
        "concurrent.futures.ProcessPoolExecutor.submit = None\n"
        "from tools.preprocess_data import main; sys.exit(main(sys.argv[1:]))"
    )
    words = [str(jsonl), "--tokenizer", tokenizer_directory, "--out", str(tmp_path / "data"), "--workers", "8"]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "360 documents" in done.stdout, done.stderr
