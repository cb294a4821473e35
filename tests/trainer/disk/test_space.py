"""What a disk takes: free space, and the limit on the size of a file, are named before anything is written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from trainer.disk.space import describe_file_limit, find_space_problem

ROOT = Path(__file__).parents[3]
WITH_A_LIMIT = """
import resource, sys
from pathlib import Path
from trainer.disk.space import describe_file_limit, find_space_problem
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
fits, too_large = (find_space_problem(Path("."), 5000, size) for size in (4096, 4097))
print(fits, too_large, describe_file_limit(), sep=" | ")
"""


def test_a_limit_on_the_size_of_files_is_named():
    done = subprocess.run([sys.executable, "-c", WITH_A_LIMIT], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip().split(" | ") == [
        "None",
        "a file of it has 4,097 bytes",
        ", where files may have 4,096 bytes at most: ulimit -f raises it",
    ], done.stderr


def test_a_disk_that_is_too_small_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**9))
    assert find_space_problem(tmp_path, 10**9, 10**9) is None and describe_file_limit() == ""
    assert find_space_problem(tmp_path, 2 * 10**9, 1).startswith("it needs 2.00 GB, and the host ")
