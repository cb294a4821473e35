"""Which directory holds a Hugging Face model: the one given, or a snapshot in a folder of the cache. Torch-free."""

from __future__ import annotations

from pathlib import Path

from configs.errors import BadInput
from trainer.disk.snapshots import find_snapshot


def find_model_directory(path: Path) -> Path:
    """Return the directory with the files; of a cache's `models--org--name`, the snapshot that `refs/main` names.

    Raises BadInput if there is no directory, or a cache's has several snapshots and no word which is meant.
    """
    if not path.is_dir():
        raise BadInput(
            f"{path}: no such directory; give that of a Hugging Face model (hf download ID --local-dir DIR fetches "
            "one)."
        )
    return find_snapshot(path, ("config.json",))
