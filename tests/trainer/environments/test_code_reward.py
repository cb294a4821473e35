"""Code that loops, forks, allocates, writes, connects and cheats, run as the reward of unit tests runs it."""

import os
import socket
import tempfile
import time
from dataclasses import replace

import psutil
import pytest

from configs.errors import BadInput
from trainer.environments.rewards import sandbox, unit_tests
from trainer.environments.rewards.reply import Reply
from trainer.environments.rewards.sandbox import Limits, NotContained, run_program
from trainer.environments.rewards.unit_tests import passes_tests

TESTS = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]
RIGHT = "def add(a, b):\n    return a + b"
LIMITS = Limits(5.0, 512, 16, 4, "namespaces")


def has_namespaces():
    try:
        sandbox.check_contained("namespaces")
    except NotContained:
        return False
    return True


needs_namespaces = pytest.mark.skipif(not has_namespaces(), reason="this machine does not allow namespaces")
ISOLATION = "namespaces" if has_namespaces() else "limits"


def is_running(process):
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def score(code, tests=TESTS, **options):
    text = f"Here it is:\n```python\n{code}\n```\nDone."
    return passes_tests(
        Reply(text, {"tests": tests}, [], 1, 10, False), **{"isolation": ISOLATION, "seconds": 30.0} | options
    )


@pytest.fixture(autouse=True)
def nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    assert not list(tmp_path.glob("shardwright_box_*"))


def test_right_and_wrong_code():
    assert score(RIGHT) == 1.0
    assert score(RIGHT, "\n".join(TESTS)) == 1.0
    assert score("def add(a, b):\n    return 3") == 0.0
    assert score("def add(a, b):\n    return 3", partial=True) == 0.5
    assert score("def add(a, b) return") == 0.0
    assert score("import dataclasses, collections\n@dataclasses.dataclass\nclass A:\n    a: 'int' = 0\n" + RIGHT) == 1.0
    assert passes_tests(Reply("no code", {"tests": TESTS}, [], 1, 10, False), isolation=ISOLATION) == 0.0
    assert passes_tests(Reply("no code", {"tests": None}, [], 1, 10, False), isolation=ISOLATION) is None


@pytest.mark.parametrize(
    "tests",
    [
        [{"input": "1 2\n", "output": "3\n"}, {"input": "5 5", "output": "10"}],
        {"inputs": ["1 2\n"], "outputs": ["3"]},
        '{"inputs": ["1 2\\n"], "outputs": ["3"]}',
    ],
)
def test_tests_by_input_and_output(tests):
    assert score("a, b = map(int, input().split())\nprint(a + b, ' ')", tests) == 1.0
    if isinstance(tests, list):
        assert score("print(3)", tests, partial=True) == 0.5


@pytest.mark.parametrize(
    "code",
    [
        "import os\nos._exit(0)",
        "raise SystemExit(0)",
        RIGHT + "\nprint('[true, true]')\nimport os\nos.write(1, b'[true, true]')\nos._exit(0)",
        """import os
for descriptor in range(3, 20):
    try:
        os.write(descriptor, b"[true, true]")
    except OSError:
        pass
"""
        + RIGHT,
        "x = bytearray(1 << 30)\n" + RIGHT,
        "while True:\n    print('x' * 1000000)",
        """import signal
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
while True:
    pass""",
        "import ctypes\nctypes.string_at(0)",
        RIGHT + "\nimport os\nif os.fork():\n    os.wait()",
        "import builtins\nbuiltins.compile = lambda *_: '0'\ndef add(a, b):\n    return 0",
        "import json\njson.dumps = lambda _: '[true, true]'\ndef add(a, b):\n    return 0",
    ],
    ids="exit SystemExit forged scribbles allocates prints loops crashes forks compiles dumps".split(),
)
def test_what_is_no_solution_is_wrong_within_its_time(code):
    began = time.monotonic()
    assert score(code, seconds=1.0) == 0.0
    assert time.monotonic() - began < 2.5


def test_tests_without_content_are_a_failure_and_limits_of_nothing_refused():
    with pytest.raises(ValueError, match="holds no tests"):
        score(RIGHT, [])
    with pytest.raises(BadInput, match="must be above 0"):
        score(RIGHT, megabytes=0)


@needs_namespaces
def test_neither_network_nor_files_nor_processes_of_the_machine_are_there(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = f"""
import os, socket
def fails(action):
    try:
        action()
    except OSError:
        return True
    return False
pid = os.getpid()
print([
    fails(lambda: socket.create_connection(("127.0.0.1", {server.getsockname()[1]}), timeout=1)),
    fails(lambda: open({str(tmp_path / "written")!r}, "w")),
    fails(lambda: open("/etc/passwd")),
    fails(lambda: open(os.__file__, "a")),
    fails(lambda: os.mkdir("/new")),
    fails(lambda: os.kill({os.getpid()}, 0)),
    fails(lambda: os.setuid(0)),
    pid < 10,
    sorted(os.environ),
    os.listdir("."),
])
open("mine", "w").write("x")
open("/dev/null", "w").write("x")
"""
        outcome = run_program(program, "", LIMITS, 10_000)
    assert (outcome.ended, outcome.code) == ("exit", 0), outcome
    *contained, environment, files = eval(outcome.output)
    assert contained == [True] * 8, contained
    assert files == ["program.py"] and set(environment) <= {"OMP_NUM_THREADS", "LC_CTYPE"}
    assert not (tmp_path / "written").exists()


@needs_namespaces
def test_processes_and_files_are_bounded():
    program = """
import os, time
children = 0
try:
    while children < 100:
        if os.fork() == 0:
            time.sleep(60)
        children += 1
except OSError:
    pass
written = 0
try:
    with open("large", "wb", buffering=0) as file:
        while written < 1 << 26:
            written += file.write(bytes(1 << 20))
except OSError:
    pass
print(children, written >> 20, flush=True)
"""
    before = time.monotonic()
    outcome = run_program(program, "", LIMITS, 10_000)
    children, megabytes = map(int, outcome.output.split())
    assert 0 < children < 16 and megabytes <= 4
    assert time.monotonic() - before < 3, "it ended with its first process"
    program = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    fork_bomb = run_program(program, "", replace(LIMITS, seconds=1.0), 100)
    assert fork_bomb.ended == "time"


def test_limits_alone_end_a_program_and_its_children_too():
    program = "import os\nprint(os.getpid(), os.fork(), flush=True)\nwhile True:\n    pass"
    outcome = run_program(program, "", Limits(1.0, 512, 16, 4, "limits"), 10_000)
    assert outcome.ended == "time"
    children = {int(one) for one in outcome.output.split()} - {0}
    assert len(children) == 2
    deadline = time.monotonic() + 5
    while any(is_running(child) for child in children):
        assert time.monotonic() < deadline, "they live on"
        time.sleep(0.01)


def test_a_machine_that_cannot_contain_is_refused(monkeypatch):
    def refuse(isolation):
        raise NotContained("PermissionError: unshare")

    monkeypatch.setattr(unit_tests, "check_contained", refuse)
    with pytest.raises(BadInput, match="options.isolation=namespaces: this machine does not run programs so .*limits"):
        score(RIGHT, isolation="namespaces")


def test_python_has_its_packages():
    limits = Limits(10.0, 2048, 16, 4, ISOLATION)
    assert run_program("import numpy; print(numpy.ones(3).sum())", "", limits, 100).output == b"3.0\n"
