"""Where a run begins, and what it says when it goes on under another config."""

from __future__ import annotations

import os
import socket
import threading
import time

import pytest

from configs.errors import BadInput
from configs.load import resolved_dict
from configs.stages import GrpoConfig, SftConfig
from tests.small_runs import DENSE_MODEL, small_config
from trainer.checkpoint.manifest import Manifest
from trainer.engine.state import TrainState
from trainer.run import start as start_module
from trainer.run.directory import RunLock
from trainer.run.start import Start, describe_changes, describe_new_use, find_start


def test_what_steers_training_is_told_and_nothing_else():
    before = resolved_dict(small_config())
    after = small_config(
        train={"num_steps": 50, "global_batch_size": 16, "log_every": 7},
        data={"train": [{"path": "made-up"}, {"path": "more"}]},
        parallel={"tp": 1, "timeout_seconds": 9},
        run={"name": "other"},
    )
    changes = describe_changes(before, resolved_dict(after))
    assert "train.num_steps is 50, it was 5" in changes
    assert "train.global_batch_size is 16, it was 8" in changes
    assert [one.split(" is ")[0] for one in changes] == ["data.train", "train.num_steps", "train.global_batch_size"]
    assert describe_changes(before, before) == []


def test_what_steers_fine_tuning_is_told_and_where_it_is_cached_is_not():
    def resolved(**sft) -> dict:
        model, train = dict(DENSE_MODEL), {"num_steps": 1}
        return resolved_dict(SftConfig.model_validate({"model": model, "train": train, "sft": sft}))

    after = resolved(weighting="sample", template="qwen", train=[{"path": "b"}], cache="elsewhere", num_workers=3)
    changes = describe_changes(resolved(train=[{"path": "a"}]), after)
    assert [one.split(" is ")[0] for one in changes] == ["sft.template", "sft.train", "sft.weighting"]


def test_a_section_that_comes_or_goes_is_told():
    def resolved(**grpo) -> dict:
        sections = {"model": dict(DENSE_MODEL), "train": {"num_steps": 1}, "grpo": grpo}
        return resolved_dict(GrpoConfig.model_validate(sections))

    without, within = resolved(), resolved(reward_model={"init_from": "runs/reward"})
    told = "{init_from: runs/reward, weight: 1.0}"
    assert describe_changes(within, without) == [f"grpo.reward_model is null, it was {told}"]
    assert describe_changes(without, within) == [f"grpo.reward_model is {told}, it was null"]
    other = resolved(reward_model={"init_from": "runs/reward", "weight": 2})
    assert describe_changes(within, other) == ["grpo.reward_model.weight is 2.0, it was 1.0"]


def test_what_changes_make_of_the_next_learning_rate_is_told(tmp_path):
    """The schedule decays over num_steps: more of them raise the rate of the very next step."""
    schedule = {"kind": "linear", "warmup_steps": 0}
    before = small_config(train={"num_steps": 10}, optimizer={"lr": 1.0, "min_lr": 0.0}, schedule=schedule)
    state = TrainState(step=5).as_dict()
    stage = {"name": "pretrain", "state": {}}
    manifest = Manifest(5, state, stage, layout={}, config=resolved_dict(before), versions={}, files={})
    (tmp_path / "run" / "checkpoints" / "step_00000005").mkdir(parents=True)
    manifest.write(tmp_path / "run" / "checkpoints" / "step_00000005")
    run = {"dir": str(tmp_path / "run")}
    after = small_config(train={"num_steps": 50}, optimizer={"lr": 1.0, "min_lr": 0.0}, schedule=schedule, run=run)
    told = find_start(after, "pretrain").changes
    assert told == (
        "train.num_steps is 50, it was 10", "so the learning rate of step 6 is 0.9, it would have been 0.5",
    )  # fmt: skip
    constant = {"kind": "constant", "warmup_steps": 0}
    assert "learning rate of" in " ".join(find_start(small_config(schedule=constant, run=run), "pretrain").changes)
    assert find_start(small_config(**resolved_dict(before) | {"run": run}), "pretrain").changes == ()


def test_nothing_is_told_of_changes_where_the_run_is_refused(tmp_path, caplog):
    manifest_config = resolved_dict(small_config())
    state, stage = TrainState(step=5).as_dict(), {"name": "pretrain", "state": {"data": {"seq_len": 7}}}
    manifest = Manifest(5, state, stage, layout={}, config=manifest_config, versions={}, files={})
    (tmp_path / "run" / "checkpoints" / "step_00000005").mkdir(parents=True)
    manifest.write(tmp_path / "run" / "checkpoints" / "step_00000005")
    config = small_config(train={"num_steps": 50}, run={"dir": str(tmp_path / "run")})
    with caplog.at_level("INFO"), pytest.raises(BadInput, match="train.seq_len: .* differs from the 7 of"):
        find_start(config, "pretrain")
    assert not caplog.messages


def test_a_field_the_saved_config_lacks_is_no_change():
    before, after = resolved_dict(small_config()), resolved_dict(small_config())
    del before["train"]["recompute"], before["schedule"]
    assert describe_changes(before, after) == []


def test_a_rank_waits_for_what_rank_zero_chose(tmp_path, monkeypatch):
    """A file system of a network may show a new checkpoint later on other hosts."""
    checkpoint = tmp_path / "step_00000001"

    def appear() -> None:
        time.sleep(0.5)
        checkpoint.mkdir()
        (checkpoint / "checkpoint.json").write_text("{}")

    thread = threading.Thread(target=appear)
    thread.start()
    Start(resume_from=checkpoint).wait_until_visible(10)
    thread.join()
    Start().wait_until_visible(0)
    monkeypatch.setattr(start_module, "_VISIBLE_SECONDS", 0)
    with pytest.raises(BadInput, match="rank 0 reads it and .* does not see it"):
        Start(init_from=tmp_path / "nowhere").wait_until_visible(10)


def test_a_run_waits_for_its_directory_as_long_as_it_may(tmp_path, caplog):
    """One that was queued again waits for what it was before; a first start does not."""
    import subprocess
    import sys

    holder = (
        "import sys, time; from pathlib import Path; from trainer.disk.lock import FileLock\n"
        f"lock = FileLock(Path({str(tmp_path / '.lock')!r}))\n"
        "assert lock.take() is None; print('held', flush=True); time.sleep(3); lock.release()"
    )
    variables = {**os.environ, "SLURM_JOB_ID": "41"}
    other = subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True, env=variables)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    lock = RunLock(str(tmp_path))
    assert f"is being written to by process {other.pid} on {socket.gethostname()}, SLURM job 41;" in str(lock._take(0))
    assert not caplog.messages
    with caplog.at_level("INFO"):
        assert lock._take(30) is None
    assert "is being written to by process" in caplog.messages[0] and caplog.messages[0].endswith("; waiting for it")
    other.wait()
    lock._lock.release()
    assert not (tmp_path / ".lock").exists()


def test_a_warm_start_tells_what_the_weights_were_not_trained_for():
    before = small_config().model
    longer = {"train": {"seq_len": 128}}
    (told,) = describe_new_use(before, 32, small_config(**longer))
    # 10000 * 4 ** (16 / 14), by which the slowest rotation turns over 128 tokens as far as it did over 32
    assert told.startswith("train.seq_len is 128, it was 32") and told.endswith("model.rope.base=48761")
    assert describe_new_use(before, 128, small_config(**longer)) == ()
    stretched = {"model": {"rope": {"base": 48761.0}, "max_position_embeddings": 256, "init_std": 0.1}}
    assert describe_new_use(before, 32, small_config(**longer, **stretched)) == (
        "model.max_position_embeddings is 256, it was 128",
        "model.rope.base is 48761.0, it was 10000.0",
    )
