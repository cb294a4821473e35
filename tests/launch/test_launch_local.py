"""The local launcher hands on worker exit codes and signals, and leaves no rank behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.errors import ExitCode
from launch.local import _wait_for_failure, main

ROOT = Path(__file__).resolve().parents[2]


LAUNCHER = """
import os, signal, sys, time
from launch.local import run_ranks
code = run_ranks([sys.executable, "-c", sys.argv[3]], int(sys.argv[1]), is_forked=sys.argv[2] == "forked",
                 patience_seconds=5.0)
if code is None:
    exec(sys.argv[3])
    sys.exit(0)
sys.exit(code)
"""


@pytest.fixture(params=["forked", "processes"])
def run_snippet(request):
    """Return a function that runs code as ranks, forked from a launcher or as processes of their own."""

    def run(code: str, num_ranks: int) -> int:
        snippet = f"import os, sys, time, signal\n{code}"
        command = [sys.executable, "-c", LAUNCHER, str(num_ranks), request.param, snippet]
        return subprocess.run(command, cwd=ROOT).returncode

    return run


def test_every_rank_gets_its_place(run_snippet, tmp_path):
    code = f"open(r'{tmp_path}/' + os.environ['RANK'], 'w').write(os.environ['WORLD_SIZE'] + os.environ['MASTER_PORT'])"
    assert run_snippet(code, 3) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2"]
    assert len({path.read_text() for path in tmp_path.iterdir()}) == 1


@pytest.mark.parametrize("code", [2, 3, 4, 5])
def test_a_workers_code_reaches_the_caller_and_the_others_end(run_snippet, code):
    start = time.monotonic()
    assert run_snippet(f"sys.exit({code}) if os.environ['RANK'] == '1' else time.sleep(60)", 2) == code
    assert time.monotonic() - start < 20


def test_a_killed_rank_is_a_lost_peer(run_snippet):
    snippet = "os.kill(os.getpid(), signal.SIGKILL) if os.environ['RANK'] == '0' else time.sleep(60)"
    assert run_snippet(snippet, 2) == ExitCode.PEER_LOST


def wait_for_files(folder: Path, name: str) -> None:
    """Wait until both ranks have made the file `<name><rank>`, 20 seconds at most."""
    deadline = time.monotonic() + 20
    while not all((folder / f"{name}{rank}").exists() for rank in (0, 1)) and time.monotonic() < deadline:
        time.sleep(0.05)


FORKING = """
import sys
from pathlib import Path
from launch.fork import run_script
from launch.local import run_ranks
code = run_ranks([], 2, is_forked=True)
if code is None:
    run_script(Path(sys.argv[1]), sys.argv[2:])
sys.exit(code)
"""


@pytest.mark.parametrize("start", [["-m", "launch.local", "--nproc-per-node", "2"], ["-c", FORKING]])
@pytest.mark.parametrize(
    ("sent", "received", "code"),
    [
        (signal.SIGUSR1, "SIGUSR1", ExitCode.STOPPED_AFTER_SAVING),
        (signal.SIGHUP, "SIGTERM", ExitCode.STOPPED_AFTER_SAVING),
        (signal.SIGKILL, "SIGTERM", -signal.SIGKILL),
    ],
)
def test_a_signal_reaches_every_rank(tmp_path, start, sent, received, code):
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
    launcher = subprocess.Popen([sys.executable, *start, str(worker), "config"], cwd=ROOT)
    wait_for_files(tmp_path, "ready")
    launcher.send_signal(sent)
    assert launcher.wait(timeout=20) == code
    wait_for_files(tmp_path, "left")
    assert (tmp_path / "left0").exists() and (tmp_path / "left1").exists()


@pytest.mark.parametrize("start", [["-m", "launch.local", "--nproc-per-node", "2"], ["-c", FORKING]])
def test_under_nohup_a_closed_terminal_ends_nothing(tmp_path, start):
    """Neither the launcher nor its ranks, which a later signal still reaches."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import os, signal, sys, time\n"
        "assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(4))\n"
        "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(3))\n"
        f"open(r'{tmp_path}/ready' + os.environ['RANK'], 'w').close()\n"
        "time.sleep(60)\n"
    )
    launcher = subprocess.Popen(["nohup", sys.executable, *start, str(worker), "config"], cwd=ROOT)
    wait_for_files(tmp_path, "ready")
    launcher.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert launcher.poll() is None
    launcher.send_signal(signal.SIGUSR1)
    assert launcher.wait(timeout=20) == ExitCode.STOPPED_AFTER_SAVING


@pytest.mark.parametrize("code", [0, 3])
def test_a_forked_rank_ends_as_a_script_does(run_snippet, tmp_path, code):
    """Threads are waited for, `atexit` runs, buffers are written, and nothing of the launcher's runs twice."""
    snippet = (
        "import atexit, threading\n"
        f"path = r'{tmp_path}/' + os.environ['RANK']\n"
        "def note(word):\n"
        "    open(path, 'a').write(word)\n"
        "atexit.register(note, 'exit ')\n"
        "threading.Thread(target=lambda: (time.sleep(0.3), note('thread '))).start()\n"
        "assert os.getsid(0) == os.getpid() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
        "assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])\n"
        f"sys.exit({code} if os.environ['RANK'] == '1' else 0)"
    )
    assert run_snippet(snippet, 2) == code
    assert (tmp_path / "1").read_text() == "thread exit "


def test_training_is_refused_before_anything_slow_is_imported(tmp_path):
    """One sentence from the launcher itself, as rank 0 says it."""
    code = (
        "import sys\n"
        "from launch.local import main\n"
        "code = main(['--nproc-per-node', '4', 'launch/pretrain.py', *sys.argv[1:]])\n"
        "assert 'torch' not in sys.modules\n"
        "sys.exit(code)"
    )
    for words, message in (
        (["configs/demo/pretrain.yaml", "parallel.tp=3"], "parallel.tp"),
        (["configs/demo/pretrain.yaml", "model.nonsense=3"], "nonsense"),
        (["configs/demo/none.yaml"], "none.yaml"),
        (["configs/demo/pretrain.yaml", "--nonsense"], "--nonsense"),
    ):
        environment = os.environ | {"SHARDWRIGHT_PLATFORM": "cpu"}
        command = [sys.executable, "-c", code, *words, f"run.dir={tmp_path}/run"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == ExitCode.BAD_INPUT and message in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


@pytest.mark.parametrize(("num_ranks", "given", "seen"), [(2, None, "1"), (2, "3", "3"), (1, None, None)])
def test_several_ranks_have_one_thread_each_unless_told_otherwise(tmp_path, num_ranks, given, seen):
    script = tmp_path / "script.py"
    script.write_text(f"import os\nassert os.environ.get('OMP_NUM_THREADS') == {seen!r}\n")
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    if given is not None:
        environment["OMP_NUM_THREADS"] = given
    command = [sys.executable, "-m", "launch.local", "--nproc-per-node", str(num_ranks), str(script), "x"]
    assert subprocess.run(command, cwd=ROOT, env=environment).returncode == 0


def test_bad_command_lines_are_refused(capsys):
    assert main(["--nproc-per-node", "x", "launch/pretrain.py"]) == ExitCode.BAD_INPUT
    assert main(["--nproc-per-node", "²", "launch/pretrain.py"]) == ExitCode.BAD_INPUT
    assert main(["--nproc-per-node", "2", "launch/nothing.py"]) == ExitCode.BAD_INPUT
    assert main(["pretrain"]) == ExitCode.BAD_INPUT
    message = capsys.readouterr().err
    assert "'x' is not a number of ranks" in message and "launch/nothing.py: no such file" in message
    assert "Traceback" not in message
    assert os.environ.get("SHARDWRIGHT_LAUNCHER") is None


def test_a_file_of_launch_that_is_no_stage_is_run_as_any_script():
    command = [sys.executable, "-m", "launch.local", "--nproc-per-node", "1", "launch/checks.py", "x"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_entry_points_path_is_read_as_every_other(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "script.py").write_text("raise SystemExit(3)\n")
    assert main(["--nproc-per-node", "1", "~/script.py", "x"]) == 3
    for path, words in (("~nobody_here/a.py", "there is no such user"), ("a" * 300, "300 bytes"), ("", "is empty")):
        assert main(["--nproc-per-node", "1", path, "x"]) == ExitCode.BAD_INPUT
        said = capsys.readouterr().err
        assert "the path of the entry point" in said and words in said


def test_a_rank_whose_launcher_has_died_already_ends(tmp_path):
    """Killed between the fork and the rank's first words to the kernel, it would be told of by nobody."""
    code = (
        "import os, sys, time\n"
        "from launch.local import _end_with_launcher\n"
        "launcher = os.getpid()\n"
        "if os.fork():\n"
        "    os._exit(0)\n"
        "while os.getppid() == launcher:\n"
        "    time.sleep(0.01)\n"
        "print('orphaned', flush=True)\n"
        "_end_with_launcher(launcher)\n"
        "print('goes on', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert (done.stdout, done.stderr) == ("orphaned\n", "")


def test_ctrl_c_while_the_config_is_checked_ends_the_launcher(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("launch.local.is_training", interrupt)
    monkeypatch.setenv("SHARDWRIGHT_PLATFORM", "cpu")
    assert main(["--nproc-per-node", "2", str(ROOT / "launch" / "pretrain.py"), "config"]) == 130
    assert capsys.readouterr().err == "interrupted; nothing had begun\n"


def test_the_cause_wins_over_the_lost_peer_that_follows_from_it():
    ranks = [subprocess.Popen([sys.executable, "-c", f"import sys; sys.exit({code})"]) for code in (5, 4)]
    for rank in ranks:
        rank.wait()
    assert _wait_for_failure(ranks) == 4


def test_a_signal_during_the_imports_ends_the_launcher():
    code = (
        "import os, signal, sys, time, types\n"
        "from launch.fork import import_trainer\n"
        "from launch.local import _FORWARDED\n"
        "slow = types.ModuleType('trainer.run.preload')\n"
        "slow.preload = lambda: (print('importing', flush=True), time.sleep(30))\n"
        "sys.modules['trainer.run.preload'] = slow\n"
        "import_trainer(_FORWARDED)\n"
    )
    for number, code_seen in ((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)):
        launcher = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
        assert launcher.stdout is not None and launcher.stdout.readline() == b"importing\n"
        launcher.send_signal(number)
        assert launcher.wait(timeout=10) == code_seen
