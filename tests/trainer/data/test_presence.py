"""Missing and damaged data is told before torch is imported, in sentences that name the file or field."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from configs.stages import Config
from trainer.data.index_file import write_index
from trainer.data.presence import find_data_problems

ROOT = Path(__file__).parents[3]
MODEL = {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 1, "vocab_size": 100}
META = {"vocabulary_hash": "x", "vocab_size": 300, "eod_id": 0, "dtype": "uint16", "num_documents": 2}
META |= {"num_tokens": 10, "num_empty_documents": 0, "fingerprint": "x", "bin_sha256": "x", "idx_sha256": "x"}


def write_data(prefix: Path) -> str:
    """Ten tokens in two documents."""
    write_index(prefix.with_suffix(".idx"), np.uint16, [np.array([6, 4], dtype=np.int32)])
    prefix.with_suffix(".bin").write_bytes(bytes(20))
    return str(prefix)


def problems(seq_len: int = 4, **data) -> list[str]:
    return find_data_problems(
        Config.model_validate({"model": MODEL, "train": {"num_steps": 1, "seq_len": seq_len}, "data": data})
    )


def test_whole_data_has_no_problems(tmp_path):
    prefix = write_data(tmp_path / "data")
    assert problems(train=[{"path": prefix}], validation=[{"path": prefix}], tokenizer=str(tmp_path)) == []
    assert problems(seq_len=9, train=[{"path": prefix}]) == []
    assert problems(seq_len=99, train=[{"path": prefix}], packing="best_fit") == []


def test_every_problem_is_told_at_once(tmp_path):
    whole, cut = write_data(tmp_path / "data"), write_data(tmp_path / "cut")
    Path(cut + ".bin").write_bytes(bytes(12))
    found = problems(
        seq_len=10,
        train=[{"path": cut}, {"path": str(tmp_path / "absent")}],
        validation=[{"path": whole}],
        tokenizer=str(tmp_path / "none"),
    )
    assert len(found) == 4 and f"data.tokenizer {tmp_path}/none: no such directory" in found[0]
    assert "cut.bin: truncated, 12 bytes where cut.idx says 20" in found[1]
    assert "absent.bin: no such file" in found[2]
    assert found[3].startswith(f"data.validation: the 10 tokens of {whole} give no sample") and found[3].endswith(
        "train.seq_len=9"
    )


@pytest.mark.parametrize(
    ("cp", "works"), [(2, "a value that would work: train.seq_len=8"), (8, "it needs at least 17")]
)
def test_a_length_that_is_advised_can_be_shared_among_ranks(tmp_path, cp, works):
    values = {"model": MODEL, "train": {"num_steps": 1, "seq_len": 16}, "parallel": {"cp": cp}}
    (problem,) = find_data_problems(
        Config.model_validate(values | {"data": {"train": [{"path": write_data(tmp_path / "data")}]}})
    )
    assert problem.endswith(works)


def test_data_of_a_larger_vocabulary_is_told_and_a_broken_meta_file(tmp_path):
    prefix = write_data(tmp_path / "data")
    meta = Path(prefix + ".meta.json")
    meta.write_text(json.dumps(META))
    assert problems(train=[{"path": prefix}])[0].endswith("a value that would work: 300")
    meta.write_bytes(b"\xef\xbb\xbf" + json.dumps(META | {"vocab_size": 100}).encode())
    assert problems(train=[{"path": prefix}]) == []
    meta.write_text(json.dumps(META | {"later": 1}))
    assert "this version does not know later; use the version that wrote it" in problems(train=[{"path": prefix}])[0]
    meta.write_text("{")
    assert "data.meta.json: not readable" in problems(train=[{"path": prefix}])[0]


@pytest.mark.parametrize("hidden", ["torch", "numpy", "megatron"])
def test_a_run_without_its_data_is_refused_before_slow_packages_are_imported(tmp_path, hidden):
    (tmp_path / "run.yaml").write_text(
        f"model: {json.dumps(MODEL)}\ntrain: {{num_steps: 1}}\nrun: {{dir: {tmp_path}/run}}\n"
        f"data: {{train: [{{path: {tmp_path}/absent}}]}}\n"
    )
    code = f"import sys; sys.modules['{hidden}'] = None\n"
    code += "from launch.main import main; sys.exit(main('pretrain', sys.argv[1:]))"
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in names}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run.yaml")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "absent.bin: no such file" in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()
