"""How a failed rank says why: torchrun's error file, recognising a lost peer, leaving at once."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from parallel.end_notes import note_end
from parallel.failures import describe_peer_loss, is_peer_loss, let_rank_zero_speak, report

ROOT = Path(__file__).resolve().parents[2]


class DistBackendError(RuntimeError):
    """Stands for torch.distributed's error of the same name."""


def says_closed(error: BaseException) -> bool:
    return "closed by peer" in str(error)


def test_report_names_the_rank_and_fills_torchruns_error_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    report("data.train: no such file", 2, rank=3)
    assert capsys.readouterr().err == "rank 3: data.train: no such file\n"
    written = json.loads((tmp_path / "error.json").read_text())
    assert (written["message"], written["exitCode"]) == ("data.train: no such file", 2)
    assert abs(written["timestamp"] - time.time()) < 10


def test_rank_zero_has_no_prefix(monkeypatch, capsys):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    report("wrong", 2)
    assert capsys.readouterr().err == "wrong\n"


def test_a_batch_script_finds_who_ended_first_with_each_code_and_why(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SHARDWRIGHT_ENDS", str(tmp_path))
    monkeypatch.setenv("SLURMD_NODENAME", "n2")
    for rank, sentence in (("3", "run.dir: is full"), ("4", "run.dir: is full too")):
        monkeypatch.setenv("RANK", rank)
        report(sentence, 2, rank=int(rank))
    note_end(0)
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {"2.n2": "rank 3 on n2: run.dir: is full\n", "0.n2": "rank 4 on n2\n"}
    monkeypatch.setenv("SHARDWRIGHT_ENDS", str(tmp_path / "gone"))
    note_end(5)  # what cannot be written changes nothing


def test_a_lost_peer_is_found_through_the_chain():
    try:
        try:
            raise RuntimeError("Connection closed by peer")
        except RuntimeError as error:
            raise ValueError("while saving") from error
    except ValueError as outer:
        assert is_peer_loss(outer, says_closed)
    assert is_peer_loss(DistBackendError("watchdog"), says_closed)


@pytest.mark.parametrize("error", [ValueError("shape mismatch"), DistBackendError("EADDRINUSE: port 29500")])
def test_other_errors_are_not_a_lost_peer(error):
    assert not is_peer_loss(error, says_closed)


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        (
            "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4911",
            "another rank was lost: it ended, or its connection broke (Connection closed by peer [127.0.0.1]:4911)",
        ),
        (
            "[../third_party/gloo/unbound_buffer.cc:81] Timed out waiting 9000ms for recv operation to complete",
            "another rank did not answer within 9 seconds (parallel.timeout_seconds) "
            "(Timed out waiting 9000ms for recv operation to complete)",
        ),
        (
            "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.hpp:268, remote process exited\nmore",
            "another rank was lost: it ended, or its connection broke (NCCL error in: remote process exited)",
        ),
        ("", "another rank was lost: it ended, or its connection broke (RuntimeError)"),
    ],
)
def test_a_closed_connection_is_no_time_out_and_the_librarys_source_is_not_named(said, sentence):
    assert describe_peer_loss(RuntimeError(said), 9) == sentence


def test_rank_zero_does_not_wait_and_others_do():
    start = time.monotonic()
    let_rank_zero_speak(0, seconds=5.0)
    assert time.monotonic() - start < 1.0
    let_rank_zero_speak(1, seconds=0.2)
    assert time.monotonic() - start >= 0.2


def test_leave_does_not_wait_for_threads_or_children():
    code = (
        "import multiprocessing, threading, time\n"
        "from parallel.failures import leave\n"
        "threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,)).start()\n"
        "leave(5)\n"
    )
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, timeout=20).returncode == 5


@pytest.mark.parametrize("code", [0, 5])
def test_leave_does_not_take_the_interpreter_down_under_threads_that_still_use_it(code):
    snippet = (
        "import logging, sys, threading, time\n"
        "from parallel.failures import leave\n"
        "class Held:\n"
        "    def __del__(self): print('taken down')\n"
        "held = Held()\n"
        "logging.basicConfig(stream=sys.stdout)\n"
        "print('said')\n"
        "logging.warning('logged')\n"
        f"leave({code})\n"
    )
    ended = subprocess.run([sys.executable, "-c", snippet], cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert (ended.returncode, ended.stdout) == (code, "said\nWARNING:root:logged\n")


def test_a_rank_that_is_done_waits_for_its_children():
    snippet = (
        "import multiprocessing, time\n"
        "from parallel.failures import leave\n"
        "def write():\n"
        "    time.sleep(0.3)\n"
        "    print('written', flush=True)\n"
        "multiprocessing.get_context('fork').Process(target=write).start()\n"
        "leave(0)\n"
    )
    ended = subprocess.run([sys.executable, "-c", snippet], cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert (ended.returncode, ended.stdout) == (0, "written\n")


@pytest.mark.parametrize("code", [0, 5])
def test_leave_says_nothing_of_a_stdout_that_takes_no_more(code):
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-c", f"print('x'); from parallel.failures import leave; leave({code})"],
            cwd=ROOT, stdout=full, stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": ""},
        )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (code, b"")
