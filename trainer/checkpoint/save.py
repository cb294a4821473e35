"""Writes checkpoints in the background; nothing is visible before every rank is done.

Every public method is collective: all ranks of the world must call it.
"""

from __future__ import annotations

import logging
import shutil
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from configs.errors import ShardwrightError
from configs.load import resolved_dict
from configs.stages import Config
from parallel.collectives import (
    barrier,
    first_of_ranks,
    gather_to_rank_zero,
    on_rank_zero,
    sum_over_ranks,
)
from parallel.mesh import Mesh
from trainer.checkpoint.base_weights import BaseWeights
from trainer.checkpoint.layout import (
    PARTIAL_PREFIX,
    apply_retention,
    checkpoint_name,
    checkpoints_dir,
    delete_part,
    delete_rest,
    name_best,
    part_directories,
    publish,
)
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.parts import collect
from trainer.checkpoint.pieces import Pieces, collect_pieces
from trainer.checkpoint.shares import WriterShares
from trainer.checkpoint.writing import TensorFileWriter, WrittenPieces, write_metadata
from trainer.disk.space import describe_file_limit, find_space_problem, free_bytes
from trainer.engine.state import TrainState
from trainer.stages.base import Stage

log = logging.getLogger(__name__)


class CheckpointFailed(ShardwrightError):
    """A checkpoint could not be written; the previous one is untouched."""


@dataclass
class _Pending:
    """A save under way on this rank."""

    step: int
    partial: Path
    manifest: dict[str, Any]
    """Of rank 0, which writes it; empty elsewhere."""
    started: float
    thread: threading.Thread | None = None
    error: BaseException | None = None
    written: WrittenPieces | None = None


class CheckpointWriter:
    """Saves a stage's state under a run directory, one checkpoint at a time."""

    def __init__(
        self,
        run_dir: str | Path,
        config: Config,
        mesh: Mesh,
        last_saved_step: int | None = None,
        on_published: Callable[[Path], None] | None = None,
        base: BaseWeights | None = None,
        models: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Write under `run_dir`; `last_saved_step` is the step the run was resumed from, which is on disk already.

        `on_published` is called on all ranks with each checkpoint once it is visible; `base` is what adapters belong
        to, where they are what is saved; `models` says by role which models there are beside the policy.
        """
        self._on_published = on_published
        self._base = base
        self._models = {role: dict(record) for role, record in (models or {}).items()}
        self._dir = checkpoints_dir(run_dir)
        self._config = config
        self._settings = config.checkpoint
        self._mesh = mesh
        self.last_saved_step = last_saved_step
        self._pending: _Pending | None = None
        self._shares = WriterShares(mesh.dp_cp_group, mesh.device)

    def save(self, state: TrainState, stage: Stage) -> None:
        """Copy the state to host memory and write it in the background (or at once with `async_save: false`).

        It is visible after `finish`, or `publish_if_written`. A save that is still under way is finished first.
        """
        self.finish()
        started = time.perf_counter()
        partial = self._dir / f"{PARTIAL_PREFIX}{checkpoint_name(state.step)}"
        pending = _Pending(state.step, partial, self._describe(state, stage) if self._mesh.rank == 0 else {}, started)
        self._on_rank_zero(pending, lambda: self._make_directories(partial))
        is_copied = self._settings.async_save  # else the ranks wait, and nothing changes what is written
        pieces = collect_pieces(collect(stage.parts, None), self._shares, self._mesh, is_copied=is_copied)
        self._check_space(pending, pieces.num_bytes)
        if self._settings.async_save:
            pending.thread = threading.Thread(target=self._write, args=(pending, pieces), name="checkpoint-writer")
            pending.thread.start()
        else:
            self._write(pending, pieces)
        self._pending = pending
        self.last_saved_step = state.step

    @property
    def is_writing(self) -> bool:
        """Whether this rank's part of a background save is still being written (not collective)."""
        thread = self._pending.thread if self._pending is not None else None
        return thread is not None and thread.is_alive()

    def publish_if_written(self, *, is_any_rank_writing: bool) -> None:
        """Publish a background save once every rank has written its part; call it once a step."""
        if self._pending is not None and not is_any_rank_writing:
            self.finish()

    def finish(self) -> None:
        """Wait for a background save and publish it. Raises CheckpointFailed on all ranks if one could not write."""
        pending = self._pending
        if pending is None:
            return
        if pending.thread is not None:
            pending.thread.join()
        self._pending = None
        failure = first_of_ranks(None if pending.error is None else self._describe_error(pending.error))
        if failure is not None:
            self._discard(pending)
            raise self._failure(pending, failure)
        parts = gather_to_rank_zero(pending.written)
        self._delete(self._on_rank_zero(pending, lambda: self._publish(pending, parts or [])))
        if self._on_published is not None:
            self._on_published(self._dir / checkpoint_name(pending.step))

    def _on_rank_zero(self, pending: _Pending, write: Callable[[], Any]) -> Any:
        """Return on all ranks what `write` returns on rank 0, or raise CheckpointFailed on all if it cannot write."""

        def write_or_fail() -> Any:
            try:
                return write()
            except OSError as error:
                shutil.rmtree(pending.partial, ignore_errors=True)
                raise self._failure(pending, f"rank 0: {error}") from error

        return on_rank_zero(write_or_fail)

    def _make_directories(self, partial: Path) -> None:
        shutil.rmtree(partial, ignore_errors=True)
        for part in part_directories(self._mesh.world_size):
            (partial / part).mkdir(parents=True)

    def _check_space(self, pending: _Pending, num_bytes: int) -> None:
        """Raise CheckpointFailed on all ranks if the disk cannot hold what all ranks are about to write."""
        needed = sum_over_ranks(num_bytes)
        problem = first_of_ranks(find_space_problem(self._dir, needed, num_bytes))
        if problem is not None:
            self._discard(pending)
            raise self._failure(pending, problem)

    def _describe_error(self, error: BaseException) -> str:
        """Return why this rank could not write, and what its host sees of the disk: that of another may be its own."""
        free = free_bytes(self._dir) / 1e9
        return f"rank {self._mesh.rank} on {socket.gethostname()}, which sees {free:.2f} GB free: {error}"

    def _failure(self, pending: _Pending, reason: str) -> CheckpointFailed:
        return CheckpointFailed(
            f"checkpoint of step {pending.step} could not be written to {self._dir} ({reason}{describe_file_limit()}); "
            "the previous checkpoint is untouched: make room there, or set run.dir to another disk, and run the "
            "command again."
        )

    def _write(self, pending: _Pending, pieces: Pieces) -> None:
        """Write this rank's file and hash it; runs in the background thread and touches no collective."""
        try:
            pending.written = pieces.write(TensorFileWriter(pending.partial, self._mesh.rank, self._mesh.world_size))
        except BaseException as error:  # handed to `finish`, which raises it on every rank
            pending.error = error

    def _publish(self, pending: _Pending, parts: Sequence[WrittenPieces]) -> list[Path]:
        """Make what all ranks wrote the latest checkpoint and return those that it makes superfluous."""
        files = write_metadata(pending.partial, parts)
        Manifest(files=files, **pending.manifest).write(pending.partial)
        final = publish(pending.partial, pending.step)
        if self._config.train.patience is not None and pending.manifest["state"]["best_step"] == pending.step:
            name_best(self._dir.parent, pending.step)
        doomed = apply_retention(final, self._settings.keep_last, self._settings.keep_every)
        num_bytes = sum(info["bytes"] for info in files.values())
        seconds = time.perf_counter() - pending.started
        log.info("saved %s (%.1f MB in %.1f s)", final, num_bytes / 1e6, seconds)
        return doomed

    def _delete(self, doomed: Sequence[Path]) -> None:
        """Delete hidden checkpoints, whose files are many where ranks are; none goes on before that is done."""
        if not doomed:
            return
        for checkpoint in doomed:
            delete_part(checkpoint, self._mesh.rank, self._mesh.world_size)
        barrier()
        if self._mesh.rank == 0:
            for checkpoint in doomed:
                delete_rest(checkpoint)
        barrier()

    def _discard(self, pending: _Pending) -> None:
        if self._mesh.rank == 0:
            shutil.rmtree(pending.partial, ignore_errors=True)
        barrier()

    def _describe(self, state: TrainState, stage: Stage) -> dict[str, Any]:
        """Return the manifest's fields but the files."""
        mesh = self._mesh
        stage_state: Mapping[str, Any] = stage.state_dict()
        return {
            "step": state.step,
            "state": state.as_dict(),
            "stage": {"name": stage.name, "state": dict(stage_state)},
            "layout": mesh.sizes(),
            "config": resolved_dict(self._config),
            "versions": {name: version(name) for name in ("torch", "megatron-core")},
            "base": self._base.as_dict() if self._base is not None else None,
            "models": self._models or None,
            "head": self._config.head,
        }
