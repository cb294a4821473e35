"""A reader that has seen enough (`... | head`) ends a tool without a word, as it ends the shell's own commands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PRINTS = "import sys; from tools.console import end_process, run_command; "
COMMANDS = {
    "short": [sys.executable, "-c", PRINTS + "end_process(lambda: run_command(lambda: print('x')))"],
    "long": [sys.executable, "-c", PRINTS + "end_process(lambda: run_command(lambda: print('x\\n' * 10**6)))"],
    "help": [sys.executable, "tools/inspect_checkpoint.py", "--help"],
    "fields": [sys.executable, "launch/pretrain.py", "--help"],
    "plan": [sys.executable, "launch/pretrain.py", "configs/demo/pretrain.yaml", "--dry-run"],
    "launcher": [sys.executable, "-m", "launch.local", "--help"],
}


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("command", COMMANDS)
def test_no_word_is_lost_on_a_reader_that_has_gone(command, buffered):
    read, write = os.pipe()
    os.close(read)
    environment = {**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"}
    ended = subprocess.run(COMMANDS[command], cwd=ROOT, stdout=write, stderr=subprocess.PIPE, env=environment)
    os.close(write)
    assert (ended.returncode in (0, 141), ended.stderr) == (True, b"")


def test_every_tool_ends_through_it():
    for file in [*ROOT.glob("tools/*.py"), *ROOT.glob("tools/bench/*.py")]:
        text = file.read_text()
        if "__main__" in text and "argparse" in text:
            assert "end_process(main)" in text, file


def test_a_pipe_that_broke_elsewhere_is_told():
    work = "def work(): raise BrokenPipeError(32, 'Broken pipe')\n"
    code = f"{PRINTS}\n{work}end_process(lambda: run_command(work))"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2 and "Broken pipe" in ended.stderr
