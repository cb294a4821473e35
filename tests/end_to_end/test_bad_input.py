"""What a user gets wrong: one sentence that names it, exit code 2, nothing written."""

from __future__ import annotations

import json
import shutil

import pytest

from configs.errors import ExitCode


@pytest.fixture
def refused(train, tmp_path):
    """Return a function that asserts that a run is refused with exit code 2, saying these words, and writes nothing."""

    def check(*overrides: str, words: tuple[str, ...], world: int = 1) -> None:
        code, sentence = train(world, f"run.dir={tmp_path}/refused", *overrides)
        assert code == ExitCode.BAD_INPUT
        assert all(word in sentence for word in words), sentence
        assert "\n" not in sentence
        assert not (tmp_path / "refused").exists()

    return check


def test_missing_and_truncated_data(refused, corpus, tmp_path):
    refused(f"data.train=[{{path: {tmp_path}/nowhere}}]", words=("nowhere.bin", "no such file"))
    for suffix in (".bin", ".idx", ".meta.json"):
        shutil.copy(f"{corpus}/train{suffix}", f"{tmp_path}/cut{suffix}")
    with open(tmp_path / "cut.bin", "r+b") as file:
        file.truncate(1000)
    refused(f"data.train=[{{path: {tmp_path}/cut}}]", words=("cut.bin", "truncated"))


def test_tokenizer_of_other_data(refused, corpus, tmp_path):
    from tests.end_to_end.conftest import write_text
    from tools.train_tokenizer import train_tokenizer

    train_tokenizer([write_text(tmp_path / "other.jsonl", 7, 50)], str(tmp_path / "other"), 290)
    refused(f"data.tokenizer={tmp_path}/other", words=("data.tokenizer", "vocabulary hash"))


def test_vocabulary_larger_than_the_model(refused):
    refused("model.vocab_size=280", words=("model.vocab_size", "a value that would work"))


def write_document(prefix, ids):
    """Write a dataset of one document without a `.meta.json`, as Megatron-LM's own tools do."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin")
    builder.add_document(ids, [len(ids)])
    builder.finalize(f"{prefix}.idx")
    return f"[{{path: {prefix}}}]"


@pytest.mark.parametrize("ids", [range(12), range(270, 340)], ids=["too_short", "unknown_ids"])
def test_data_that_shows_its_fault_late_leaves_everything_as_it_was(train, tmp_path, ids):
    """Neither is a directory made, nor are later checkpoints set aside, nor metrics cut."""
    bad = ("data.tokenizer=null", f"data.validation={write_document(tmp_path / 'bad', list(ids))}")
    code, sentence = train(1, f"run.dir={tmp_path}/refused", *bad)
    assert code == ExitCode.BAD_INPUT and sentence.startswith("data.validation: "), sentence
    assert not (tmp_path / "refused").exists()
    assert train(1, "train.num_steps=4")[0] == ExitCode.DONE
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    back = f"checkpoint.resume={tmp_path}/run/checkpoints/step_00000002"
    assert train(1, back, *bad)[0] == ExitCode.BAD_INPUT
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_checkpoint_of_another_architecture(train, refused, tmp_path):
    assert train(1, "train.num_steps=2")[0] == ExitCode.DONE
    options = ("model.num_layers=4", "model.qk_norm=true")
    words = ("model.num_layers is 2 there and 4 here", "model.qk_norm is False there and True here")
    refused(f"checkpoint.init_from={tmp_path}/run", *options, words=words)
    refused(f"checkpoint.resume={tmp_path}/run/checkpoints/latest", *options, words=words)


def test_checkpoint_that_is_not_there(refused, tmp_path):
    refused(f"checkpoint.resume={tmp_path}/nowhere", words=("checkpoint.resume", "no complete checkpoint"))
    refused(f"checkpoint.init_from={tmp_path}/nowhere", words=("checkpoint.init_from", "no complete checkpoint"))


@pytest.mark.parametrize("place", ["a_file", "a_file/below"])
def test_run_directory_that_cannot_be_one(train, tmp_path, place):
    (tmp_path / "a_file").write_text("not a directory")
    code, sentence = train(1, f"run.dir={tmp_path}/{place}")
    assert code == ExitCode.BAD_INPUT and "run.dir" in sentence


def test_another_seed_does_not_continue_a_run(train):
    assert train(1, "train.num_steps=2")[0] == ExitCode.DONE
    code, sentence = train(1, "run.seed=7")
    assert code == ExitCode.BAD_INPUT and "run.seed: 7 differs from the 1234" in sentence


def test_manifest_without_its_parts(train, refused, tmp_path):
    assert train(1, "train.num_steps=2")[0] == ExitCode.DONE
    manifest = tmp_path / "run" / "checkpoints" / "latest" / "checkpoint.json"
    content = json.loads(manifest.read_text())
    for part in ("config", "state", "stage"):
        manifest.write_text(
            json.dumps(content | {part: {}, "step": 2} if part != "state" else content | {part: {"x": 1}})
        )
        refused(f"checkpoint.resume={tmp_path}/run/checkpoints/latest", words=("checkpoint.json", "unreadable"))


def test_resume_never_refuses_a_run_with_checkpoints(train, tmp_path):
    train(1, "train.num_steps=2")
    code, sentence = train(1, "checkpoint.resume=never")
    assert code == ExitCode.BAD_INPUT and "checkpoint.resume" in sentence


@pytest.mark.parametrize("damage", ["flip", "cut", "lose"])
def test_damaged_shard(train, refused, tmp_path, damage):
    assert train(2, "parallel.tp=2")[0] == ExitCode.DONE
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000006"
    shard = sorted(checkpoint.glob("__1_*.distcp"))[0]
    content = bytearray(shard.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    elif damage == "cut":
        shard.write_bytes(content[:-100])
    else:
        shard.unlink()
    words = (shard.name, "cannot be trusted", "checkpoint.resume=", "step_00000004")
    refused("parallel.tp=2", f"checkpoint.resume={checkpoint}", words=words, world=2)
    earlier = f"checkpoint.resume={tmp_path}/run/checkpoints/step_00000004"
    assert train(2, "parallel.tp=2", f"run.dir={tmp_path}/again", earlier)[0] == ExitCode.DONE


@pytest.mark.parametrize("fault", ["full_disk", "full_disk_at_the_end", "too_small_disk"])
def test_full_disk_leaves_the_previous_checkpoint_usable(train, tmp_path, fault):
    code, sentence = train(2, "parallel.tp=2", fault=fault)
    assert code != ExitCode.DONE
    assert "step 4 could not be written" in sentence and "previous checkpoint is untouched" in sentence
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["latest", "step_00000002"]
    assert train(2, "parallel.tp=2")[0] == ExitCode.DONE


def test_a_half_written_checkpoint_is_not_seen_and_is_cleared_away(train, tmp_path):
    train(1, "train.num_steps=4")
    folder = tmp_path / "run" / "checkpoints"
    shutil.copytree(folder / "step_00000004", folder / ".partial-step_00000006")
    (folder / ".partial-step_00000006" / "checkpoint.json").unlink()
    shutil.copytree(folder / "step_00000004", folder / "step_00000005")
    (folder / "step_00000005" / "checkpoint.json").unlink()
    assert train(1, "train.num_steps=5")[0] == ExitCode.DONE
    assert not (folder / ".partial-step_00000006").exists()
    log = (tmp_path / "run" / "logs" / "attempt_2" / "rank_0.log").read_text()
    assert "step_00000004" in log
