"""Every command on a Python without Shardwright's packages: one sentence, and its own checkout's code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [
    script.relative_to(ROOT).as_posix()
    for folder in ("launch", "tools")
    for script in sorted((ROOT / folder).rglob("*.py"))
    if 'if __name__ == "__main__":' in script.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_says_which_python_to_use(script, tmp_path):
    """`-S` hides what is installed, Shardwright too: the sentence comes from the packages beside the script."""
    command = [sys.executable, "-S", str(ROOT / script), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "lacks Shardwright's packages; run `make setup` once" in done.stderr


def test_all_scripts_were_found():
    assert len(SCRIPTS) >= 13 and "launch/pretrain.py" in SCRIPTS and "tools/bench/throughput.py" in SCRIPTS
