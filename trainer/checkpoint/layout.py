"""Names and order of checkpoint directories under a run. Torch-free; knows nothing of what is inside them.

`<run.dir>/checkpoints/step_00000100/` is whole by construction: it is written under a hidden name and renamed when
every rank is done. `latest` is a symbolic link, replaced atomically, and so is `best`, where a run keeps one. The files
of many ranks lie in directories of `FILES_PER_DIRECTORY`, so that none grows with the number of ranks.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from configs.errors import BadInput

PARTIAL_PREFIX = ".partial-"
DELETED_PREFIX = ".deleted-"
ABANDONED_PREFIX = "abandoned_"
LATEST = "latest"
NEXT_LATEST = f".{LATEST}.new"
BEST = "best"
"""Link to the checkpoint of the lowest validation loss, of a run with `train.patience`."""
EXPORT = "hf"
"""Directory, in a checkpoint, of the Hugging Face model that it was exported as."""
FILES_PER_DIRECTORY = 256
"""Ranks whose files share a directory of a checkpoint; those of a smaller run lie in the checkpoint itself."""
_NAME = re.compile(r"step_(\d{8,})")


def checkpoints_dir(run_dir: str | Path) -> Path:
    """Return the directory that holds a run's checkpoints."""
    return Path(run_dir) / "checkpoints"


def checkpoint_name(step: int) -> str:
    """Return the directory name of the checkpoint after `step` steps."""
    return f"step_{step:08d}"


def part_directories(num_ranks: int) -> list[str]:
    """Return the directories in a checkpoint for the files of so many ranks; of few it is the checkpoint itself."""
    if num_ranks <= FILES_PER_DIRECTORY:
        return ["."]
    return [f"part_{number:04d}" for number in range(-(-num_ranks // FILES_PER_DIRECTORY))]


def part_directory(rank: int, num_ranks: int) -> str:
    """Return the directory of a checkpoint that a rank writes into."""
    return part_directories(num_ranks)[rank // FILES_PER_DIRECTORY if num_ranks > FILES_PER_DIRECTORY else 0]


def list_checkpoints(run_dir: str | Path) -> list[Path]:
    """Return a run's complete checkpoints in the order of their steps."""
    named = [path for path in checkpoints_dir(run_dir).glob("step_*") if _NAME.fullmatch(path.name)]
    return sorted((path for path in named if (path / "checkpoint.json").is_file()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint's directory name."""
    return int(checkpoint.name.removeprefix("step_"))


def latest_checkpoint(run_dir: str | Path) -> Path | None:
    """Return the checkpoint that `latest` names, or the newest complete one if the link is missing; None if none.

    After a kill between the two renamings of `publish` it is the one that `latest` was about to name.
    """
    for name in (NEXT_LATEST, LATEST):
        link = checkpoints_dir(run_dir) / name
        if (link / "checkpoint.json").is_file():
            return link.resolve()
    complete = list_checkpoints(run_dir)
    return complete[-1] if complete else None


def resolve_checkpoint(path: str | Path) -> Path | None:
    """Return the checkpoint meant by a path to one, to `latest` or `best`, or to a run directory; None if none."""
    given = Path(path)
    if (given / "checkpoint.json").is_file():
        return given.resolve()
    return latest_checkpoint(given)


def existing_checkpoint(path: str, field: str) -> Path:
    """Return the checkpoint that a field of the config names. Raises BadInput if there is none."""
    checkpoint = resolve_checkpoint(path)
    if checkpoint is not None:
        return checkpoint
    if (Path(path) / "config.json").is_file() and any(Path(path).glob("*.safetensors")):
        raise BadInput(f"{field}: {path} is a Hugging Face model; name it as checkpoint.init_from_hf.")
    raise BadInput(f"{field}: {path} holds no complete checkpoint; name one like runs/<name>/checkpoints/latest.")


def publish(partial: Path, step: int) -> Path:
    """Give a finished checkpoint its name and move `latest` to it; both renames are atomic. Rank 0 alone calls this.

    The link comes first: if a kill parts the two renames, it tells the next start that the checkpoint is the latest.
    """
    parent = partial.parent
    final = parent / checkpoint_name(step)
    if final.exists():
        delete_rest(hide(final))
    link = parent / NEXT_LATEST
    link.unlink(missing_ok=True)
    link.symlink_to(final.name)
    os.replace(partial, final)
    os.replace(link, parent / LATEST)
    _sync_directory(parent)
    return final


def best_checkpoint(run_dir: str | Path) -> Path | None:
    """Return the checkpoint that `best` names; None if there is none."""
    link = checkpoints_dir(run_dir) / BEST
    return link.resolve() if (link / "checkpoint.json").is_file() else None


def name_best(run_dir: str | Path, step: int | None) -> None:
    """Let `best` name the checkpoint of `step`, atomically, or nothing where there is none. Rank 0 alone calls this."""
    link = checkpoints_dir(run_dir) / BEST
    next_link = link.with_name(f".{BEST}.new")
    next_link.unlink(missing_ok=True)  # what a kill has left
    name = "" if step is None else checkpoint_name(step)
    if name and (link.parent / name / "checkpoint.json").is_file():
        next_link.symlink_to(name)
        os.replace(next_link, link)
    else:
        link.unlink(missing_ok=True)


def hide(checkpoint: Path) -> Path:
    """Give a checkpoint that is to be deleted a hidden name, so that a kill in the middle leaves nothing that looks
    whole, and return its new path."""
    doomed = checkpoint.parent / f"{DELETED_PREFIX}{checkpoint.name}"
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(checkpoint, doomed)
    return doomed


def delete_part(doomed: Path, rank: int, num_ranks: int) -> None:
    """Delete this rank's share of a hidden checkpoint: a directory of files, if it is the first of those that share it.

    What is left then, a handful of files, is rank 0's to delete with `delete_rest`.
    """
    if num_ranks > FILES_PER_DIRECTORY and rank % FILES_PER_DIRECTORY == 0:
        shutil.rmtree(doomed / part_directory(rank, num_ranks), ignore_errors=True)


def delete_rest(doomed: Path) -> None:
    """Delete what is left of a hidden checkpoint."""
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(run_dir: str | Path) -> None:
    """Finish or delete what an interrupted save or deletion left. Rank 0 alone calls this, with no save under way."""
    link = checkpoints_dir(run_dir) / NEXT_LATEST
    if (link / "checkpoint.json").is_file():
        os.replace(link, link.with_name(LATEST))
    link.unlink(missing_ok=True)
    for prefix in (PARTIAL_PREFIX, DELETED_PREFIX):
        for leftover in checkpoints_dir(run_dir).glob(f"{prefix}*"):
            shutil.rmtree(leftover, ignore_errors=True)


def set_aside_after(run_dir: str | Path, step: int) -> list[Path]:
    """Rename checkpoints beyond `step` to `abandoned_*` when a run goes on from it, and return their new paths.

    They belong to a course of training that is given up; under their own names, retention would count them as newest.
    One that was set aside earlier keeps its place.
    """
    moved = []
    for checkpoint in list_checkpoints(run_dir):
        if step_of(checkpoint) > step:
            aside = checkpoint.with_name(ABANDONED_PREFIX + checkpoint.name)
            number = 1
            while aside.exists():
                number += 1
                aside = checkpoint.with_name(f"{ABANDONED_PREFIX}{checkpoint.name}_{number}")
            os.replace(checkpoint, aside)
            moved.append(aside)
    return moved


def apply_retention(published: Path, keep_last: int, keep_every: int | None) -> list[Path]:
    """Hide all but the newest `keep_last` checkpoints of a run and those at multiples of `keep_every` steps.

    Returns the hidden ones, for deletion. What was just published, and what `latest` and `best` name, stays whatever
    its number.
    """
    run_dir = published.parent.parent
    doomed = []
    spared = {published, latest_checkpoint(run_dir), best_checkpoint(run_dir)}
    for checkpoint in list_checkpoints(run_dir)[:-keep_last]:
        is_kept_for_good = keep_every is not None and step_of(checkpoint) % keep_every == 0
        if not is_kept_for_good and checkpoint not in spared and checkpoint.resolve() not in spared:
            doomed.append(hide(checkpoint))
    return doomed


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
