"""Where a tool may write: every `--out` is looked at before any work begins. Torch-free."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.errors import BadInput


def check_prefix(out: str) -> None:
    """Refuse a dataset's path that has no name of its own, whose files would be hidden ones or lie beside a folder."""
    if os.path.basename(out) in ("", ".", "..") or os.path.isdir(out):
        works = os.path.join(out, "train")
        raise BadInput(f"--out {out}: a directory, and a dataset needs a name in it; a value that would work: {works}")


def check_directory(out: str, example: str) -> None:
    """Refuse what cannot be a directory to write; `example` is a value that would work."""
    if os.path.lexists(out) and not os.path.isdir(out):
        raise BadInput(f"--out {out}: a file, and a directory is needed; a value that would work: {example}")


@contextmanager
def whole_directory(out: Path) -> Iterator[Path]:
    """Yield a directory to fill. It becomes the new directory `out` when it is whole; after an error there is none."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        temporary.chmod(0o755)
        yield temporary
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_file(out: Path, option: str = "--out") -> None:
    """Refuse a result file's path that is a directory, or that lies in none."""
    if out.is_dir():
        works = out / ("page.html" if option == "--html" else "results.json")
        raise BadInput(f"{option} {out}: a directory, and a file is needed; a value that would work: {works}")
    if not out.parent.is_dir():
        raise BadInput(
            f"{out}: cannot be written, as there is no directory {out.parent}; make it, or name another file"
        )
