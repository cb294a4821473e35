"""Which directory holds a Hugging Face model: the one given, or a snapshot in a folder of the cache. Torch-free."""

from __future__ import annotations

from pathlib import Path

from configs.errors import BadInput


def find_model_directory(path: Path) -> Path:
    """Return the directory with the files; of a cache's `models--org--name`, the snapshot that `refs/main` names.

    Raises BadInput if there is no directory, or a cache's has several snapshots and no word which is meant.
    """
    if not path.is_dir():
        raise BadInput(
            f"{path}: no such directory; give that of a Hugging Face model (hf download ID --local-dir DIR fetches "
            "one)."
        )
    folder = path / "snapshots"
    if (path / "config.json").is_file() or not folder.is_dir():
        return path
    snapshots = sorted(one for one in folder.iterdir() if (one / "config.json").is_file())
    try:
        meant = (path / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        meant = ""
    found = [one for one in snapshots if one.name == meant] or snapshots
    if len(found) != 1:
        works = found[0] if found else folder / "REVISION"
        raise BadInput(
            f"{path}: is a folder of the Hugging Face cache with {len(found)} snapshots that have a config.json; give "
            f"one, such as {works}."
        )
    return found[0]
