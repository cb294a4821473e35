"""What every tool checks first: where it may write, and whether a launcher started it several times."""

from __future__ import annotations

import os

import pytest

from configs.errors import BadInput
from tools import compare_runs, inspect_checkpoint, prepare_corpus, preprocess_data, train_tokenizer
from tools.outputs import check_directory, check_file, check_prefix
from tools.ranks import read_environment

SLURM_JOB = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_NODELIST": "localhost"}
SLURM_TASK = SLURM_JOB | {"SLURM_STEP_ID": "0", "SLURM_LOCALID": "0", "SLURM_TASKS_PER_NODE": "4"}
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"}


@pytest.fixture
def launched(monkeypatch):
    """Return a function that gives this process a launcher's variables and no others."""

    def set_variables(variables: dict[str, str]) -> None:
        for name in list(os.environ):
            if name.startswith("SLURM_") or name in TORCHRUN:
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_variables


@pytest.mark.parametrize("name", ["{}/", "{}", "{}/.", "{}/new/"])
def test_a_dataset_needs_a_name_of_its_own(tmp_path, jsonl, tokenizer_directory, capsys, name):
    out = name.format(tmp_path)
    command = [str(jsonl), "--tokenizer", tokenizer_directory, "--out", out, "--workers", "1"]
    assert preprocess_data.main(command) == 2
    assert "--out" in (told := capsys.readouterr().err) and "a value that would work: " in told
    assert not list(tmp_path.iterdir())
    check_prefix(told.split("a value that would work: ")[1].strip())


def test_a_directory_must_be_able_to_be_one(tmp_path, monkeypatch, jsonl, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("precious")
    assert train_tokenizer.main([str(jsonl), "--out", "file", "--vocab-size", "300"]) == 2
    assert prepare_corpus.main(["--out", "file"]) == 2
    assert capsys.readouterr().err.count("a value that would work: data/") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_trailing_slash_still_names_a_directory(tmp_path, jsonl):
    assert train_tokenizer.main([str(jsonl), "--out", f"{tmp_path}/new/", "--vocab-size", "300"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]
    check_directory(f"{tmp_path}/other/", "data/x")
    with pytest.raises(BadInput, match="a file is needed"):
        check_file(tmp_path)


@pytest.mark.parametrize(
    ("variables", "how"), [(SLURM_TASK, "srun --ntasks=1"), (TORCHRUN, "without torchrun")], ids=["srun", "torchrun"]
)
def test_tools_of_one_process_refuse_to_be_several(
    launched, tmp_path, jsonl, tokenizer_directory, capsys, variables, how
):
    launched(variables)
    out = str(tmp_path / "out")
    for tool, words in [
        (preprocess_data, [str(jsonl), "--tokenizer", tokenizer_directory, "--out", out]),
        (train_tokenizer, [str(jsonl), "--out", out, "--vocab-size", "300"]),
        (prepare_corpus, ["--out", out]),
        (inspect_checkpoint, [out]),
        (compare_runs, [out, out]),
    ]:
        assert tool.main(words) == 2
        told = capsys.readouterr().err
        assert "works in one process and 4 were started" in told and how in told, tool
    assert not list(tmp_path.iterdir())


def test_a_task_of_srun_knows_its_rank(launched):
    launched(SLURM_TASK | {"SLURM_PROCID": "3", "SLURM_LOCALID": "3"})
    found = read_environment()
    assert (found.rank, found.world_size, found.local_rank) == (3, 4, 3)


def test_a_batch_script_without_srun_works_alone(launched, tmp_path, jsonl):
    launched(SLURM_JOB)
    assert read_environment().world_size == 1
    assert train_tokenizer.main([str(jsonl), "--out", str(tmp_path / "new"), "--vocab-size", "300"]) == 0


def test_variables_that_contradict_each_other_are_told(launched, capsys):
    launched({"RANK": "1"})
    assert inspect_checkpoint.main(["nowhere"]) == 2
    assert "WORLD_SIZE" in capsys.readouterr().err
