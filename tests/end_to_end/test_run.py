"""A whole run: what it leaves behind, how it stops, and that it continues exactly."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs.errors import ExitCode
from tests.end_to_end.faults import SAVING
from tests.pool import RankFailed
from trainer.checkpoint.layout import latest_checkpoint

STABLE_KEYS = ["step", "loss", "grad_norm", "lr", "num_tokens", "tokens_per_second", "seconds"]
NAMED = {"latest", "hiding", "deletion"}
"""Phases of a save in which a start finds the checkpoint already."""


def rows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def curve(run_dir: Path) -> list[tuple]:
    return [(row["step"], row["loss"], row["grad_norm"], row["lr"]) for row in rows(run_dir)]


def checkpoint_names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_a_run_leaves_everything_behind(train, tmp_path):
    assert train(2, "parallel.tp=2", "train.eval_every=3", "sample.prompts=[def, import]", "sample.num_tokens=4") == (
        0,
        "",
    )
    run_dir = tmp_path / "run"
    steps = rows(run_dir)
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert list(steps[0])[:7] == STABLE_KEYS
    assert steps[0]["num_tokens"] == 8 * 32 and steps[-1]["consumed_samples"] == 48
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5, "the model learnt nothing"
    assert [row["step"] for row in steps if "validation_loss/validation" in row] == [3, 6]
    assert all(row["tflops_per_device"] > 0 and row["peak_memory_gb"] > 0 for row in steps)
    for phase in ("data", "forward_backward", "optimizer", "checkpoint"):
        assert all(row[f"seconds_{phase}"] >= 0 for row in steps)
    assert checkpoint_names(run_dir) == ["latest", "step_00000002", "step_00000004", "step_00000006"]
    assert (run_dir / "checkpoints" / "latest").resolve().name == "step_00000006"
    assert json.loads((run_dir / "config.json").read_text())["parallel"]["tp"] == 2
    assert json.loads((run_dir / "environment.json").read_text())["layout"]["tp"] == 2
    assert re.match(r"# 20\S+: 2 ranks on 1 host\(s\), by single, each:\n", (run_dir / "command.txt").read_text())
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("validation_loss/validation")] == [0, 3, 6]
    log = (run_dir / "logs" / "attempt_1" / "rank_0.log").read_text()
    assert log.count("sample: ") == 2 and "before training" in log
    assert (run_dir / "logs" / "attempt_1" / "rank_1.log").exists()


def test_a_finished_run_started_again_changes_nothing(train, tmp_path):
    train(1)
    before = curve(tmp_path / "run"), checkpoint_names(tmp_path / "run")
    assert train(1)[0] == ExitCode.DONE
    assert (curve(tmp_path / "run"), checkpoint_names(tmp_path / "run")) == before


@pytest.mark.parametrize("fault", ["sigterm", "sigusr1"])
def test_a_signal_on_one_rank_saves_and_the_run_continues_exactly(train, tmp_path, fault):
    """Also on another layout, where the curve stays within 1e-5."""
    assert train(2, "parallel.tp=2", f"run.dir={tmp_path}/whole")[0] == ExitCode.DONE
    options = ("parallel.tp=2", "checkpoint.save_every=100", f"run.dir={tmp_path}/stopped")
    assert train(2, *options, fault=fault)[0] == ExitCode.STOPPED_AFTER_SAVING
    assert checkpoint_names(tmp_path / "stopped") == ["latest", "step_00000003"]
    assert train(2, *options)[0] == ExitCode.DONE
    assert curve(tmp_path / "stopped") == curve(tmp_path / "whole")
    resumed = f"checkpoint.resume={tmp_path}/stopped/checkpoints/step_00000003"
    assert train(2, "parallel.pp=2", f"run.dir={tmp_path}/moved", resumed)[0] == ExitCode.DONE
    for moved, whole in zip(curve(tmp_path / "moved"), curve(tmp_path / "whole")[3:], strict=True):
        assert moved == pytest.approx(whole, rel=1e-5)


def test_packed_and_long_documents_go_on_exactly_on_another_layout(train, corpus, tmp_path):
    source = f"{{path: {corpus}/train, long_document_tokens: 40, long_document_share: 0.6}}"
    options = ("data.packing=best_fit", "data.document_mask=true", f"data.train=[{source}]", "train.eval_every=3")
    assert train(1, *options, f"run.dir={tmp_path}/whole")[0] == ExitCode.DONE
    resumed = f"checkpoint.resume={tmp_path}/whole/checkpoints/step_00000002"
    assert train(2, *options, "parallel.cp=2", f"run.dir={tmp_path}/moved", resumed)[0] == ExitCode.DONE
    for moved, whole in zip(curve(tmp_path / "moved"), curve(tmp_path / "whole")[2:], strict=True):
        assert moved == pytest.approx(whole, rel=1e-5)
    for moved, whole in zip(rows(tmp_path / "moved"), rows(tmp_path / "whole")[2:], strict=True):
        assert moved.keys() == whole.keys() and whole["num_tokens"] <= whole["num_input_tokens"] == 8 * 32
        for key in {"num_tokens", "num_input_tokens", "consumed_tokens", "validation_loss/validation"} & whole.keys():
            assert moved[key] == pytest.approx(whole[key], rel=1e-5)
    log = (tmp_path / "moved" / "logs" / "attempt_1" / "rank_0.log").read_text()
    assert log.count(" of all samples, read ") == 2 and "(documents of at least 40 tokens)" in log


def test_going_back_sets_later_checkpoints_aside(train, tmp_path):
    """Retention must not take what was given up for the newest, and delete what `latest` names."""
    folder = tmp_path / "run" / "checkpoints"
    assert train(1, "checkpoint.save_every=1", "checkpoint.keep_last=1")[0] == ExitCode.DONE
    assert train(1, "checkpoint.save_every=1", f"run.dir={tmp_path}/run", "train.num_steps=8")[0] == ExitCode.DONE
    shutil.copytree(folder / "step_00000006", folder / "step_00000006.bak")
    back = ("checkpoint.keep_last=1", f"checkpoint.resume={folder}/step_00000006", "train.num_steps=7")
    assert train(1, *back)[0] == ExitCode.DONE
    assert (folder / "latest").resolve() == (folder / "step_00000007").resolve()
    assert (folder / "abandoned_step_00000008").exists()
    assert [step for step, *_ in curve(tmp_path / "run")] == [1, 2, 3, 4, 5, 6, 7]


def test_going_on_from_elsewhere_keeps_what_it_saves(train, tmp_path):
    """The directory holds later steps of another course: they are set aside, not taken for the newest."""
    assert train(1, "train.num_steps=12", "checkpoint.save_every=6")[0] == ExitCode.DONE
    assert train(1, f"run.dir={tmp_path}/elsewhere", "train.num_steps=2")[0] == ExitCode.DONE
    back = (f"checkpoint.resume={tmp_path}/elsewhere", "checkpoint.keep_last=1", "train.num_steps=4")
    assert train(1, *back)[0] == ExitCode.DONE
    names = ["abandoned_step_00000006", "abandoned_step_00000012", "latest", "step_00000004"]
    assert checkpoint_names(tmp_path / "run") == names
    assert (tmp_path / "run" / "checkpoints" / "latest" / "checkpoint.json").is_file()


@pytest.mark.parametrize("fault", ["blind_rank", "looking_before_locking", "slow_disk"])
def test_rank_zero_decides_with_the_directory_locked_and_files_may_take_long(train, tmp_path, fault):
    assert train(2, "train.num_steps=4")[0] == ExitCode.DONE
    assert train(2, "parallel.timeout_seconds=4", "checkpoint.keep_last=1", fault=fault)[0] == ExitCode.DONE
    assert [step for step, *_ in curve(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert checkpoint_names(tmp_path / "run") == ["latest", "step_00000006"]


@pytest.mark.slow
@pytest.mark.parametrize("phase", SAVING)
def test_a_kill_in_a_save_leaves_a_checkpoint_and_nothing_else(train, tmp_path, phase):
    run_dir, settings = tmp_path / "run", ("checkpoint.keep_last=1", "train.num_steps=5")
    with pytest.raises(RankFailed):
        train(2, *settings, fault=f"killed_{phase}")
    before = latest_checkpoint(run_dir)
    assert before is not None and before.name == f"step_0000000{4 if phase in NAMED else 2}"
    assert train(2, *settings)[0] == ExitCode.DONE
    left = [path.name for path in (run_dir / "checkpoints").iterdir()]
    assert sorted(left) == ["latest", "step_00000005"]
    assert [row["step"] for row in rows(run_dir)] == [1, 2, 3, 4, 5]


def test_a_changed_config_is_told(train, tmp_path):
    assert train(1, "train.num_steps=2")[0] == ExitCode.DONE
    assert train(1, "train.num_steps=4", "optimizer.lr=5.0e-3")[0] == ExitCode.DONE
    log = (tmp_path / "run" / "logs" / "attempt_2" / "rank_0.log").read_text()
    assert "another config: train.num_steps is 4, it was 2" in log and "optimizer.lr is 0.005, it was 0.01" in log


def test_a_command_queued_again_continues_instead_of_going_back_twice(train, tmp_path):
    """The same command goes on from its own newest checkpoint; a changed one goes back once more."""
    folder = tmp_path / "run" / "checkpoints"
    assert train(1, "checkpoint.save_every=1")[0] == ExitCode.DONE
    back = ("checkpoint.save_every=1", f"checkpoint.resume={folder}/step_00000002", "train.num_steps=5")
    assert train(1, *back, fault="sigterm_rank_0_second_step")[0] == ExitCode.STOPPED_AFTER_SAVING
    assert (folder / "abandoned_step_00000006").exists()
    assert (folder / "latest").resolve().name == "step_00000004"
    assert train(1, *back)[0] == ExitCode.DONE
    assert "step 3/5" not in (tmp_path / "run" / "logs" / "attempt_3" / "rank_0.log").read_text()
    assert train(1, *back, "optimizer.lr=5.0e-3")[0] == ExitCode.DONE
    assert "step 3/5" in (tmp_path / "run" / "logs" / "attempt_4" / "rank_0.log").read_text()


def test_a_run_directory_takes_one_run_at_a_time(train, tmp_path):
    holder = (
        "import fcntl, sys\n"
        f"file = open(r'{tmp_path}/run/.lock', 'w')\n"
        "fcntl.lockf(file, fcntl.LOCK_EX)\n"
        "file.write('process 7 on elsewhere')\n"
        "file.flush()\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    (tmp_path / "run").mkdir()
    with subprocess.Popen([sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        code, sentence = train(2)
        other.stdin.close()
    assert code == ExitCode.BAD_INPUT and "being written to by process 7 on elsewhere" in sentence
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    assert train(2)[0] == ExitCode.DONE


@pytest.mark.parametrize("fault", ["moved_directory", "moved_while_saving", "directory_taken_over"])
def test_a_run_whose_directory_goes_ends_at_once_and_leaves_the_place_alone(train, tmp_path, fault):
    """It would make the directory anew with its next checkpoint, or save into that of the run that came after it."""
    assert train(1, f"run.dir={tmp_path}/whole")[0] == ExitCode.DONE
    code, sentence = train(1, fault=fault)
    assert code == ExitCode.BAD_INPUT and "was moved, removed or taken over" in sentence
    left = {path.name for path in (tmp_path / "run").glob("*")}
    assert left == ({".lock"} if fault == "directory_taken_over" else set())
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    (tmp_path / "moved").rename(tmp_path / "run")
    assert train(1)[0] == ExitCode.DONE
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


def test_layouts_agree_from_one_seed_checkpoint(train, tmp_path):
    assert train(1, "train.num_steps=0", f"run.dir={tmp_path}/seed")[0] == ExitCode.DONE
    assert checkpoint_names(tmp_path / "seed") == ["latest", "step_00000000"]
    for name, world, layout in (("one", 1, "parallel.tp=1"), ("four", 4, "parallel.tp=4")):
        options = (layout, f"checkpoint.init_from={tmp_path}/seed", f"run.dir={tmp_path}/{name}")
        assert train(world, *options)[0] == ExitCode.DONE
    for four, one in zip(curve(tmp_path / "four"), curve(tmp_path / "one"), strict=True):
        assert four == pytest.approx(one, rel=1e-5)


def test_non_finite_losses_are_skipped_named_and_stop_the_run(train, tmp_path):
    code, sentence = train(2, "train.max_nonfinite_steps=2", fault="nan_loss")
    assert code == ExitCode.NON_FINITE
    assert "2 steps in a row, up to step 5" in sentence
    assert "rank 1 (tp 0/1, cp 0/1, dp 1/2" in sentence
    steps = rows(tmp_path / "run")
    assert [row["num_skipped_steps"] for row in steps] == [0, 1, 1, 2, 3]
    assert steps[1]["loss"] is None and steps[2]["loss"] is not None
    log = (tmp_path / "run" / "logs" / "attempt_1" / "rank_0.log").read_text()
    assert "step 2: non-finite" in log and "samples [10, 11]" in log


def test_batch_ramp_and_document_masks(train, tmp_path):
    ramp = "train.batch_ramp={start: 4, increment: 4, num_samples: 8}"
    assert train(2, ramp, "data.document_mask=true", "parallel.pp=2")[0] == ExitCode.DONE
    consumed = [row["consumed_samples"] for row in rows(tmp_path / "run")]
    assert consumed[0] == 4 and consumed[-1] - consumed[-2] == 8
    for row in rows(tmp_path / "run"):
        assert row["num_tokens"] < row["num_input_tokens"] <= 8 * 32, "ends of documents must not count"
        assert row["tokens_per_second"] == pytest.approx(row["num_input_tokens"] / row["seconds"])
        assert row["counted_tokens_per_second"] == pytest.approx(row["num_tokens"] / row["seconds"])
