"""A run that commit 60ed303 began: two of four steps, with the data it read, as that version wrote it."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

OLD_RUN = Path(__file__).parent / "written_by_60ed303.tar.xz"


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    """Return a directory with `tiny.yaml`, its data `tiny.bin` and `.idx`, and the run directory `run`."""
    with tarfile.open(OLD_RUN) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path
