"""A directory that appears when it is whole has nothing of ours in it then, and a kill's leftovers are known."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.pool import Place
from trainer.disk.growing import remove_leftover


def names_when_it_appears(place: Place, target: str) -> list[str]:
    """Make a directory of one file and return what it holds at the moment it gets its name."""
    from unittest.mock import patch

    from tools.ranks import host_ranks
    from trainer.disk.growing import growing_directory

    names: list[str] = []
    replace = os.replace

    def look(source: Path, goal: Path) -> None:
        replace(source, goal)
        names.extend(sorted(os.listdir(goal)))

    with host_ranks(), patch.object(os, "replace", look), growing_directory(Path(target), rank=0) as growing:
        (growing / "file").touch()
    return names


def test_a_kill_right_after_the_renaming_leaves_no_lock_inside(ranks, tmp_path):
    assert ranks.run(names_when_it_appears, str(tmp_path / "target")) == [["file"]]
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_leftover_is_removed_and_nothing_else(tmp_path):
    """Not what another process is writing now, nor a directory or link of the user's own."""
    for name in ("dead", "writing", "early", "users"):
        (tmp_path / f"{name}.growing" / "content").mkdir(parents=True)
    (tmp_path / "early.growing" / "content").rmdir()
    for name in ("dead", "writing"):
        (tmp_path / f"{name}.growing" / ".lock").touch()
    (tmp_path / "link.growing").symlink_to(tmp_path / "writing.growing")
    holder = (
        "import fcntl, sys\n"
        f"file = open(r'{tmp_path}/writing.growing/.lock', 'w')\n"
        "fcntl.lockf(file, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        for name in ("dead", "writing", "early", "users", "link", "none"):
            remove_leftover(tmp_path / name)
        other.stdin.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.growing", "users.growing", "writing.growing"]
