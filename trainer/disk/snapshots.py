"""A folder of the Hugging Face cache (`models--org--name`) -> the snapshot in it that is meant. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from configs.errors import BadInput


def find_snapshot(path: Path, holding: Sequence[str]) -> Path:
    """Return the directory itself, but of a cache's folder the snapshot that `refs/main` names, or the only one.

    A directory that is meant holds one of the files `holding`. Raises BadInput where several snapshots do, or none
    does, and no word says which is meant.
    """

    def is_meant(directory: Path) -> bool:
        return any((directory / name).is_file() for name in holding)

    folder = path / "snapshots"
    if is_meant(path) or not folder.is_dir():
        return path
    snapshots = sorted(filter(is_meant, folder.iterdir()))
    try:
        main = (path / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        main = ""
    found = [one for one in snapshots if one.name == main] or snapshots
    if len(found) != 1:
        works = found[0] if found else folder / "REVISION"
        raise BadInput(
            f"{path}: is a folder of the Hugging Face cache with {len(found)} snapshots that have a "
            f"{' or '.join(holding)}; give one, such as {works}."
        )
    return found[0]
