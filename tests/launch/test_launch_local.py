"""The local launcher hands on worker exit codes and signals, and leaves no rank behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.errors import ExitCode
from launch.local import _wait_for_failure, main, run_ranks

ROOT = Path(__file__).resolve().parents[2]


def run_snippet(code: str, num_ranks: int) -> int:
    return run_ranks([sys.executable, "-c", f"import os, sys, time, signal\n{code}"], num_ranks, patience_seconds=5.0)


def test_every_rank_gets_its_place(tmp_path):
    code = f"open(r'{tmp_path}/' + os.environ['RANK'], 'w').write(os.environ['WORLD_SIZE'] + os.environ['MASTER_PORT'])"
    assert run_snippet(code, 3) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2"]
    assert len({path.read_text() for path in tmp_path.iterdir()}) == 1


@pytest.mark.parametrize("code", [2, 3, 4, 5])
def test_a_workers_code_reaches_the_caller_and_the_others_end(code):
    start = time.monotonic()
    assert run_snippet(f"sys.exit({code}) if os.environ['RANK'] == '1' else time.sleep(60)", 2) == code
    assert time.monotonic() - start < 20


def test_a_killed_rank_is_a_lost_peer():
    snippet = "os.kill(os.getpid(), signal.SIGKILL) if os.environ['RANK'] == '0' else time.sleep(60)"
    assert run_snippet(snippet, 2) == ExitCode.PEER_LOST


def wait_for_files(folder: Path, name: str) -> None:
    """Wait until both ranks have made the file `<name><rank>`, 20 seconds at most."""
    deadline = time.monotonic() + 20
    while not all((folder / f"{name}{rank}").exists() for rank in (0, 1)) and time.monotonic() < deadline:
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("sent", "received", "code"),
    [
        (signal.SIGUSR1, "SIGUSR1", ExitCode.STOPPED_AFTER_SAVING),
        (signal.SIGHUP, "SIGTERM", ExitCode.STOPPED_AFTER_SAVING),
        (signal.SIGKILL, "SIGTERM", -signal.SIGKILL),
    ],
)
def test_a_signal_reaches_every_rank(tmp_path, sent, received, code):
    """Also when it closes the terminal, or ends the launcher before it can hand anything on."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import os, signal, sys, time\n"
        "def leave(*_):\n"
        f"    open(r'{tmp_path}/left' + os.environ['RANK'], 'w').close()\n"
        "    sys.exit(3)\n"
        f"signal.signal(signal.{received}, leave)\n"
        f"open(r'{tmp_path}/ready' + os.environ['RANK'], 'w').close()\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-m", "launch.local", "--nproc-per-node", "2", str(worker), "config"]
    launcher = subprocess.Popen(command, cwd=ROOT)
    wait_for_files(tmp_path, "ready")
    launcher.send_signal(sent)
    assert launcher.wait(timeout=20) == code
    wait_for_files(tmp_path, "left")
    assert (tmp_path / "left0").exists() and (tmp_path / "left1").exists()


def test_bad_command_lines_are_refused(capsys):
    assert main(["--nproc-per-node", "x", "launch/pretrain.py"]) == ExitCode.BAD_INPUT
    assert main(["--nproc-per-node", "2", "launch/nothing.py"]) == ExitCode.BAD_INPUT
    assert main(["pretrain"]) == ExitCode.BAD_INPUT
    message = capsys.readouterr().err
    assert "'x' is not a number of ranks" in message and "launch/nothing.py: no such file" in message
    assert "Traceback" not in message
    assert os.environ.get("SHARDWRIGHT_LAUNCHER") is None


def test_the_cause_wins_over_the_lost_peer_that_follows_from_it():
    ranks = [subprocess.Popen([sys.executable, "-c", f"import sys; sys.exit({code})"]) for code in (5, 4)]
    for rank in ranks:
        rank.wait()
    assert _wait_for_failure(ranks) == 4
