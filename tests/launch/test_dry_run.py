"""--dry-run checks what the config names and this machine has, without torch; what is not here it only tells."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from configs.errors import BadInput, ExitCode
from launch.main import is_training, main
from parallel.platform import processor

ROOT = Path(__file__).parents[2]
OLD_RUN = ROOT / "tests" / "trainer" / "checkpoint" / "written_by_60ed303.tar.xz"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return a directory with a run of two steps, its config `tiny.yaml`, its data and a tokenizer of 60 ids."""
    with tarfile.open(OLD_RUN) as archive:
        archive.extractall(tmp_path, filter="data")
    vocabulary = {f"t{number}": number for number in range(60)}
    (tmp_path / "tokenizer").mkdir()
    content = {"version": "1.0", "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "t0"}}
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "t1"}))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refused(folder, capsys):
    """Return a function that asserts exit code 2 and returns the sentences."""

    def run(*overrides: str) -> list[str]:
        assert main("pretrain", ["tiny.yaml", "--dry-run", *overrides]) == ExitCode.BAD_INPUT
        captured = capsys.readouterr()
        assert captured.out == ""
        return captured.err.splitlines()

    return run


def test_a_run_that_can_go_on_passes(folder, capsys):
    assert main("pretrain", ["tiny.yaml", "--dry-run", "model.vocab_pad_multiple=1"]) == ExitCode.DONE
    assert "padded to 50" in capsys.readouterr().out


def test_what_is_not_on_this_machine_is_told_and_not_refused(folder, capsys):
    words = ["data.tokenizer=gone/t", "data.train=[{path: gone/d}]", "checkpoint.resume=gone/run", "run.dir=gone/other"]
    assert main("pretrain", ["tiny.yaml", "--dry-run", *words]) == ExitCode.DONE
    out = capsys.readouterr().out
    for path in ("gone/t", "gone/d", "gone/run"):
        assert f"{path}: not on this machine" in out
    assert not (folder / "gone").exists()


def test_the_checkpoint_that_would_be_continued_is_compared(refused, folder):
    (sentence,) = refused("model.num_layers=4")
    assert "step_00000002: holds another architecture: model.num_layers is 2 there and 4 here" in sentence
    assert sentence.endswith(", or begin another run, such as run.dir=run-2.")
    (sentence,) = refused("run.seed=7")
    assert sentence.startswith("run.seed: 7 differs from the 1234 of ")
    assert "use 1234, or begin another run, such as run.dir=run-2 (with checkpoint.init_from=" in sentence
    (sentence,) = refused("train.seq_len=16")
    assert sentence.startswith("train.seq_len: 16 differs from the 8 of ") and "begin another run" in sentence
    (sentence,) = refused("data.packing=best_fit", "data.document_mask=true")
    assert sentence.startswith("data.packing: best_fit differs from the concat of ") and "; use concat, or" in sentence
    (sentence,) = refused("checkpoint.resume=never")
    assert sentence.startswith("checkpoint.resume: never, but run holds checkpoints")
    with pytest.raises(BadInput, match="run.seed: 7 differs"):  # and before torch is imported where it is no plan
        is_training("pretrain", ["tiny.yaml", "run.seed=7"], 1)
    other = ("run.dir=other", "checkpoint.resume=run", "model.tie_embeddings=false")
    (sentence,) = refused(*other)
    assert "model.tie_embeddings is True there and False here" in sentence
    assert sentence.endswith("such as run.dir=other-2 checkpoint.resume=auto.")
    (sentence,) = refused("run.dir=other", "checkpoint.resume=empty")
    assert sentence.startswith("checkpoint.resume: empty holds no complete checkpoint")
    (sentence,) = refused("run.dir=other", "checkpoint.init_from=empty")
    assert sentence.startswith("checkpoint.init_from: empty holds no complete checkpoint")


def test_a_reward_model_is_no_start_of_a_language_model(refused, folder):
    (manifest,) = folder.rglob("checkpoint.json")
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"head": "scalar"}))
    (sentence,) = refused(f"checkpoint.init_from={manifest.parent}", "run.dir=other")
    assert "holds a model with a scalar head" in sentence and sentence.endswith("such as the one that it began with.")


def test_a_job_queued_again_looks_at_its_checkpoint_under_the_lock_alone(folder, monkeypatch):
    """What it was before may still be finishing one."""
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert is_training("pretrain", ["tiny.yaml", "run.seed=7"], 1)


def test_what_becomes_of_packed_and_of_long_documents_is_told(refused, folder, capsys):
    source = "{path: tiny, long_document_tokens: 40, long_document_share: 0.5}"
    words = ["data.packing=best_fit", "data.document_mask=true", "run.dir=other", f"data.train=[{source}]"]
    assert main("pretrain", ["tiny.yaml", "--dry-run", *words]) == ExitCode.DONE
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("order of data ")]
    assert len(told) == 2 and all("50.0% of all samples, read " in line for line in told)
    assert "rows, " in told[0] and "of them padding" in told[0]
    (sentence,) = refused(*words[:3], f"data.train=[{source.replace('40', '999')}]")
    assert sentence.startswith("data.train: tiny has no document of long_document_tokens=999 tokens, its longest has ")


def test_a_checkpoint_of_another_stage_is_not_continued(refused, folder):
    path = folder / "run" / "checkpoints" / "latest" / "checkpoint.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"stage": {"name": "import_hf", "state": {}}}))
    (sentence,) = refused()
    assert "was saved by the import_hf stage, this is pretrain" in sentence


def test_tokenizer_and_data_are_compared_with_the_model(refused, folder):
    (sentence,) = refused("data.tokenizer=tokenizer")
    assert sentence == (
        "model.vocab_size: 50 is less than the 60 token ids of data.tokenizer tokenizer; a value that would work: 60"
    )
    (sentence,) = refused("data.tokenizer=empty")
    assert sentence.startswith("data.tokenizer: ") and "tokenizer.json" in sentence
    for name in ("train", "validation"):
        shutil.copy("tiny.bin", "cut.bin")
        shutil.copy("tiny.idx", "cut.idx")
        os.truncate("cut.bin", 100)
        (sentence,) = refused(f"data.{name}=[{{path: cut}}]")
        assert sentence.startswith(f"data.{name}: ") and "truncated" in sentence
    words = (
        "train.seq_len=240",
        "model.max_position_embeddings=512",
        "run.dir=other",
        "data.validation=[{path: tiny}]",
    )
    assert refused(*words) == [
        f"data.{name}: the 240 tokens of tiny give no sample of train.seq_len=240 and the token that follows; a value "
        "that would work: train.seq_len=239"
        for name in ("train", "validation")
    ]


def test_a_folder_of_the_hugging_face_cache_means_its_snapshot(refused, folder):
    """As everywhere else: in a run, in `tools/`, for a model's weights."""
    top = folder / "models--org--name"
    (top / "snapshots").mkdir(parents=True)
    shutil.copytree("tokenizer", top / "snapshots" / "abc")
    (sentence,) = refused(f"data.tokenizer={top}")
    assert "is less than the 60 token ids" in sentence
    (top / "snapshots" / "abc" / "config.json").write_text('{"architectures": ["Strange"]}')
    (sentence,) = refused(f"checkpoint.init_from_hf={top}", "run.dir=other")
    assert "abc/config.json: architectures ['Strange'] cannot be converted" in sentence
    shutil.copytree("tokenizer", top / "snapshots" / "def")
    (sentence,) = refused(f"data.tokenizer={top}")
    assert f"2 snapshots that have a tokenizer.json or tokenizer_config.json; give one, such as {top}" in sentence
    (top / "refs").mkdir()
    (top / "refs" / "main").write_text("def")
    (sentence,) = refused(f"data.tokenizer={top}")
    assert "is less than the 60 token ids" in sentence


def test_all_problems_come_at_once(refused):
    found = refused("data.tokenizer=empty", "run.seed=7", "train.eval_every=1", "checkpoint.init_from=empty")
    assert [sentence.split(":")[0] for sentence in found] == [
        "train.eval_every",
        "data.tokenizer",
        "run.seed",
        "checkpoint.init_from",
    ]


def test_unknown_fields_and_broken_rules_come_together(refused):
    found = refused("train.sequence_length=10", "train.eval_every=1", "run.seed=7")
    assert [sentence.split(":")[0] for sentence in found] == ["train.sequence_length", "train.eval_every", "run.seed"]


def test_a_plan_nobody_gave_a_size_says_so_and_what_its_memory_fits(folder, capsys):
    recipe = [str(ROOT / "configs" / "pretrain" / "llama3_1_8b_fp8.yaml"), "--dry-run"]
    assert main("pretrain", recipe) == ExitCode.DONE
    out = capsys.readouterr().out
    assert "planned for                 1 rank, the fewest of this layout; --world-size N plans for more" in out
    assert "fits in                     a GPU of 180 GB (of the usual 24, 40, 48, 80, 141, 180)" in out
    assert main("pretrain", [*recipe, "--world-size", "64"]) == ExitCode.DONE
    out = capsys.readouterr().out
    assert "planned for" not in out and "a GPU of 80 GB" in out
    assert main("pretrain", [*recipe, "model.num_layers=80"]) == ExitCode.DONE
    assert "fits in                     no GPU of the usual" in capsys.readouterr().out


def test_a_format_the_processor_has_no_units_for_is_told(folder, capsys, monkeypatch):
    monkeypatch.setenv("SHARDWRIGHT_PLATFORM", "cpu")
    monkeypatch.setattr(processor, "_CPUINFO", folder / "cpuinfo")
    for text, compute, is_slow in (
        ("flags\t\t: fpu avx512f avx512vl\n", "bf16", True),
        ("flags\t\t: fpu amx_bf16 avx512_bf16\n", "bf16", False),
        ("flags\t\t: fpu avx512_bf16\n", "fp16", True),
        ("flags\t\t: fpu\n", "fp32", False),
        ("Features\t: fp asimd asimdhp bf16\n", "fp16", False),
        ("nothing that is known\n", "bf16", False),
    ):
        (folder / "cpuinfo").write_text(f"processor\t: 0\n{text}\n")
        words = ["tiny.yaml", "--dry-run", f"precision.compute={compute}", "run.dir=other"]
        assert main("pretrain", words) == ExitCode.DONE
        told = (
            f"slow here        precision.compute: this processor has no units for {compute}" in capsys.readouterr().out
        )
        assert told == is_slow, text
    (folder / "cpuinfo").unlink()
    assert not processor.lacks_units("bf16")


def test_it_needs_no_torch(folder):
    code = (
        "import sys; from launch.main import main; code = main('pretrain', sys.argv[1:]); "
        "slow = {'torch', 'megatron', 'transformers'} & set(sys.modules); assert not slow, slow; sys.exit(code)"
    )
    words = ["tiny.yaml", "--dry-run", "data.tokenizer=tokenizer", "model.vocab_size=60", "run.dir=other"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
