"""Errors whose cause the user can mend: one sentence with what to change, the exit code, and what comes next."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from configs.errors import ExitCode, NonFinite
from configs.load import load_config
from launch.causes import describe_cause, describe_continuation
from launch.checks import memory_problem, start_problems
from launch.main import main
from parallel.environment import Environment
from parallel.platform import host_memory

TINY = str(Path(__file__).parents[2] / "configs" / "models" / "tiny.yaml")
WORDS = [TINY, "train.num_steps=2", "data.train=[{path: a}]", "train.global_batch_size=1", "train.seq_len=64"]


@pytest.fixture
def config(tmp_path):
    return load_config(WORDS[0], [*WORDS[1:], f"run.dir={tmp_path}/run"])


def os_error(number: int, file: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), file)


class OutOfMemoryError(RuntimeError):
    """torch's error of that name."""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ..."),
        OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        os_error(errno.ENOMEM),
    ],
)
def test_memory_that_runs_out_names_what_takes_less(config, error):
    sentence = describe_cause(error, config, 1)
    assert sentence is not None and "\n" not in sentence
    assert sentence.startswith("memory ran out") and "train.micro_batch_size" in sentence and " GiB" in sentence


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "no space left on device; make room"),
        (errno.EDQUOT, "make room within the quota"),
        (errno.EFBIG, "file too large; raise the limit on the size of a file (ulimit -f)"),
        (errno.EROFS, "read-only file system; set run.dir"),
        (errno.EACCES, "permission denied; give this user"),
        (errno.EMFILE, "ulimit -n"),
    ],
)
def test_a_failed_write_names_file_and_cause(config, number, words):
    for file, place in (("run/metrics.jsonl", "run/metrics.jsonl: "), (None, "a file of run.dir")):
        sentence = describe_cause(os_error(number, file), config, 1)
        assert sentence is not None and sentence.startswith(place) and words in sentence


def test_the_cause_is_found_behind_what_was_raised_from_it(config):
    try:
        try:
            raise os_error(errno.ENOSPC, "x")
        except OSError as cause:
            raise RuntimeError("writer failed") from cause
    except RuntimeError as error:
        assert str(describe_cause(error, config, 1)).startswith("x: no space left")


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), KeyError("step"), os_error(errno.ECONNRESET)])
def test_a_bug_or_a_lost_peer_is_no_cause_to_mend(config, error):
    assert describe_cause(error, config, 1) is None


def test_what_comes_next_is_what_is_on_disk(config, tmp_path):
    assert describe_continuation(None) == "nothing had begun"
    assert "no checkpoint has been written, so the same command begins anew" in describe_continuation(config)
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "checkpoint.json").touch()
    assert describe_continuation(config) == f"the same command continues from {checkpoint}"
    never = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"resume": "never"})})
    assert describe_continuation(never) == f"checkpoint.resume=auto continues from {checkpoint}"


@pytest.fixture
def run_raises(monkeypatch, capsys, tmp_path):
    """Return a function that runs the command line with a trainer that raises; it gives exit code and stderr."""
    import sys
    import types

    monkeypatch.setenv("SHARDWRIGHT_PLATFORM", "cpu")
    monkeypatch.setattr("trainer.data.presence.find_data_problems", lambda config: [])
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)

    def run(error: BaseException) -> tuple[int, str]:
        def fail(*anything: object) -> None:
            raise error

        before = dict(os.environ)
        monkeypatch.setitem(sys.modules, "trainer.run.run", types.SimpleNamespace(run=fail))
        monkeypatch.setitem(sys.modules, "trainer.report.log", types.SimpleNamespace(start_console=lambda rank: None))
        try:
            return main("pretrain", [*WORDS, f"run.dir={tmp_path}/run"]), capsys.readouterr().err
        finally:
            os.environ.clear()
            os.environ.update(before)

    return run


def test_the_command_line_ends_in_one_sentence_and_the_right_code(run_raises):
    anew = "no checkpoint has been written, so the same command begins anew\n"
    code, said = run_raises(os_error(errno.ENOSPC, "run/config.json"))
    assert code == ExitCode.BAD_INPUT and said.count("\n") == 1
    assert said.startswith("run/config.json: no space left on device; make room") and said.endswith(anew)
    code, said = run_raises(MemoryError())
    assert code == ExitCode.BAD_INPUT and said.startswith("memory ran out: by estimate") and said.endswith(anew)
    code, said = run_raises(NonFinite("5 steps in a row ...; lower optimizer.lr, or look at that data"))
    assert code == ExitCode.NON_FINITE and said.endswith(f"look at that data; {anew}")
    code, said = run_raises(KeyboardInterrupt())
    assert code == 130 and said == f"interrupted; {anew}"
    code, said = run_raises(RuntimeError("shapes differ"))
    assert code == 1 and "Traceback" in said and said.endswith("RuntimeError: shapes differ\n")


def test_a_peer_that_is_lost_before_the_first_checkpoint_promises_none(run_raises):
    class DistBackendError(RuntimeError):
        """torch.distributed's error of that name."""

    code, said = run_raises(DistBackendError("Connection closed by peer"))
    assert code == ExitCode.PEER_LOST and "(Connection closed by peer); no checkpoint has been written" in said


def test_a_folder_of_the_run_that_may_not_be_entered_is_a_problem_and_no_traceback(config, monkeypatch):
    def refuse(*anything: object) -> None:
        raise os_error(errno.EACCES, "runs/a/checkpoints/latest")

    monkeypatch.setattr("trainer.checkpoint.layout.latest_checkpoint", refuse)
    (told,) = start_problems(config, "pretrain")
    assert told.startswith("runs/a/checkpoints/latest: permission denied; give this user the permission")


def test_a_path_that_may_not_be_looked_into_is_one_sentence(monkeypatch, capsys):
    def refuse(*anything: object, **options: object) -> None:
        raise os_error(errno.EACCES, "runs/a/checkpoints")

    monkeypatch.setattr("launch.dry_run.start_problems", refuse)
    assert main("pretrain", [*WORDS, "--dry-run"]) == ExitCode.BAD_INPUT
    said = capsys.readouterr().err
    assert said == "runs/a/checkpoints: permission denied; give this user the permission, or name another path\n"


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_closed_paths_are_refused_before_anything_starts(monkeypatch, capsys, options):
    monkeypatch.setenv("SHARDWRIGHT_PLATFORM", "cpu")
    monkeypatch.setattr("configs.rules.paths.find_access_problem", lambda path, suffixes: f"{path} may not be read")
    assert main("pretrain", [*WORDS, "data.tokenizer=t", *options]) == ExitCode.BAD_INPUT
    advice = "give it the permissions, or name another path"
    assert capsys.readouterr().err.splitlines() == [
        f"run.dir: runs/run may not be read; {advice}",
        f"data.tokenizer: t may not be read; {advice}",
        f"data.train[0].path: a may not be read; {advice}",
    ]


def test_a_model_beyond_the_hosts_memory_is_refused_before_it_is_built(config, monkeypatch):
    one, four = (Environment(world_size=size, local_world_size=size) for size in (1, 4))
    dp4 = config.model_copy(update={"train": config.train.model_copy(update={"global_batch_size": 4})})
    assert memory_problem(config, one, "cpu") is None
    monkeypatch.setattr("launch.checks.host_memory_bytes", lambda: 40 * 2**20)
    # 4 M parameters: 2 bytes of weights and 4 of gradient on every rank, 12 of ZeRO-1 state shared by the four
    assert memory_problem(config, one, "cpu") is not None
    sentence = memory_problem(dp4, four, "cpu")
    assert sentence is not None and "of 4 rank(s) on this host take 0.1 GiB, and it has 0.0 GiB" in sentence
    assert memory_problem(config, one, "cuda") is None
    monkeypatch.setattr("launch.checks.host_memory_bytes", lambda: None)
    assert memory_problem(config, one, "cpu") is None


def test_the_containers_limit_counts_where_it_is_less(monkeypatch, tmp_path):
    host = host_memory.host_memory_bytes()
    assert host is not None and host > 2**30
    (tmp_path / "memory.max").write_text("123456\n")
    (tmp_path / "unlimited").write_text("max\n")
    monkeypatch.setattr(host_memory, "_CGROUP_LIMITS", (tmp_path / "unlimited", tmp_path / "memory.max"))
    assert host_memory.host_memory_bytes() == 123456
