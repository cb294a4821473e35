"""A folder of the Hugging Face cache means its snapshot."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.errors import BadInput
from trainer.hf.directories import find_model_directory


def cache(path: Path, *snapshots: str, meant: str | None = None) -> Path:
    """Make a cache's folder with these snapshots; an unfinished one has no config.json."""
    top = path / "models--org--name"
    for name in snapshots:
        (top / "snapshots" / name).mkdir(parents=True)
        (top / "snapshots" / name / "config.json").write_text("{}")
    (top / "snapshots" / "unfinished").mkdir(parents=True)
    if meant is not None:
        (top / "refs").mkdir()
        (top / "refs" / "main").write_text(meant + "\n")
    return top


def test_a_model_directory_is_itself(tmp_path):
    (tmp_path / "config.json").touch()
    (tmp_path / "snapshots").mkdir()
    assert find_model_directory(tmp_path) == tmp_path


@pytest.mark.parametrize("meant", ["abc", None, "unfinished"])
def test_the_one_snapshot_is_found(tmp_path, meant):
    top = cache(tmp_path, "abc", meant=meant)
    assert find_model_directory(top) == top / "snapshots" / "abc"


def test_main_says_which_of_several(tmp_path):
    top = cache(tmp_path, "abc", "def", meant="def")
    assert find_model_directory(top) == top / "snapshots" / "def"


@pytest.mark.parametrize("snapshots", [(), ("abc", "def")])
def test_without_main_the_user_is_pointed_to_snapshots(tmp_path, snapshots):
    top = cache(tmp_path, *snapshots)
    with pytest.raises(BadInput, match=f"with {len(snapshots)} snapshots that have a config.json; give one, such as"):
        find_model_directory(top)


def test_a_path_that_is_none_is_named(tmp_path):
    with pytest.raises(BadInput, match="nothing: no such directory"):
        find_model_directory(tmp_path / "nothing")
