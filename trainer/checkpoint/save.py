"""Writes checkpoints in the background; nothing is visible before every rank is done.

Every public method is collective: all ranks of the world must call it.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from configs.errors import ShardwrightError
from configs.load import resolved_dict
from configs.stages import Config
from parallel.collectives import barrier, gather_objects
from parallel.mesh import Mesh
from trainer.checkpoint.base_weights import BaseWeights
from trainer.checkpoint.layout import (
    PARTIAL_PREFIX,
    apply_retention,
    checkpoint_name,
    checkpoints_dir,
    name_best,
    publish,
)
from trainer.checkpoint.manifest import Manifest, hash_file
from trainer.checkpoint.parts import collect
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
    request: AsyncRequest
    manifest: dict[str, Any]
    started: float
    thread: threading.Thread | None = None
    error: BaseException | None = None
    files: dict[str, dict[str, Any]] = field(default_factory=dict)


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
    ) -> None:
        """Write under `run_dir`; `last_saved_step` is the step the run was resumed from, which is on disk already.

        `on_published` is called on all ranks with each checkpoint once it is visible; `base` is what adapters belong
        to, where they are what is saved.
        """
        self._on_published = on_published
        self._base = base
        self._dir = checkpoints_dir(run_dir)
        self._config = config
        self._settings = config.checkpoint
        self._mesh = mesh
        self.last_saved_step = last_saved_step
        self._pending: _Pending | None = None
        self._is_first = True
        self._strategy = FullyParallelSaveStrategyWrapper(
            TorchDistSaveShardedStrategy(), mesh.dp_cp_group, do_cache_distribution=True
        )

    def save(self, state: TrainState, stage: Stage) -> None:
        """Copy the state to host memory and write it in the background (or at once with `async_save: false`).

        It is visible after `finish`, or `publish_if_written`. A save that is still under way is finished first.
        """
        self.finish()
        partial = self._dir / f"{PARTIAL_PREFIX}{checkpoint_name(state.step)}"
        if self._mesh.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        barrier()
        tensors = collect(stage.parts, None)
        # While the ranks wait for the writing, nothing changes what is written.
        shards = nested_values(tensors) if self._settings.async_save else ()
        live = {_storage(shard.data) for shard in shards if _is_tensor(shard)}
        request = dist_checkpointing.save(
            tensors,
            str(partial),
            self._strategy,
            validate_access_integrity=self._is_first,
            async_sharded_save=True,
            async_strategy="mcore",
        )
        self._is_first = False  # which rank holds what does not change
        pending = _Pending(state.step, partial, request, self._describe(state, stage), time.perf_counter())
        buckets = _copy_to_host(request, live)
        self._check_space(pending, buckets)
        if self._settings.async_save:
            pending.thread = threading.Thread(target=self._write, args=(pending, buckets), name="checkpoint-writer")
            pending.thread.start()
            self._pending = pending
        else:
            self._write(pending, buckets)
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
        outcomes = gather_objects((str(pending.error) if pending.error else None, pending.files))
        failures = [f"rank {rank}: {error}" for rank, (error, _) in enumerate(outcomes) if error]
        if failures:
            self._discard(pending)
            raise self._failure(pending, failures[0])
        for finalize in pending.request.finalize_fns:
            finalize()
        if self._mesh.rank == 0:
            self._publish(pending, {name: info for _, files in outcomes for name, info in files.items()})
        barrier()
        if self._on_published is not None:
            self._on_published(self._dir / checkpoint_name(pending.step))

    def _check_space(self, pending: _Pending, buckets: Any) -> None:
        """Raise CheckpointFailed on all ranks if the disk cannot hold what all ranks are about to write."""
        sizes = [sum(tensor.nbytes for _, tensor in tensor_data) for _, _, (_, tensor_data) in buckets or []]
        needed = sum(gather_objects(sum(sizes)))
        problems = gather_objects(find_space_problem(self._dir, needed, max(sizes, default=0)))
        for problem in filter(None, problems):
            self._discard(pending)
            raise self._failure(pending, problem)

    def _failure(self, pending: _Pending, reason: str) -> CheckpointFailed:
        free = free_bytes(self._dir) / 1e9
        return CheckpointFailed(
            f"checkpoint of step {pending.step} could not be written to {self._dir}, which has {free:.2f} GB free "
            f"({reason}{describe_file_limit()}); the previous checkpoint is untouched: make room there, or set run.dir "
            "to another disk, and run the command again."
        )

    def _write(self, pending: _Pending, buckets: Any) -> None:
        """Write this rank's files and hash them; runs in the background thread and touches no collective."""
        request = pending.request
        try:
            if request.async_fn is not None:
                rank, _, results = request.async_fn_args
                request.async_fn(rank, buckets, results)
                outcome = results.get()
                if isinstance(outcome, BaseException):
                    raise outcome
                results.put(outcome)
                for _, file_name, _ in buckets:
                    pending.files[file_name] = hash_file(pending.partial / file_name)
        except BaseException as error:  # handed to `finish`, which raises it on every rank
            pending.error = error

    def _publish(self, pending: _Pending, files: dict[str, dict[str, Any]]) -> None:
        for path in pending.partial.iterdir():
            if path.name not in files:
                files[path.name] = hash_file(path)
        Manifest(files=dict(sorted(files.items())), **pending.manifest).write(pending.partial)
        final = publish(pending.partial, pending.step)
        if self._config.train.patience is not None and pending.manifest["state"]["best_step"] == pending.step:
            name_best(self._dir.parent, pending.step)
        apply_retention(final, self._settings.keep_last, self._settings.keep_every)
        num_bytes = sum(info["bytes"] for info in files.values())
        seconds = time.perf_counter() - pending.started
        log.info("saved %s (%.1f MB in %.1f s)", final, num_bytes / 1e6, seconds)

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
        }


def _copy_to_host(request: AsyncRequest, live: Container[int]) -> Any:
    """Return the write buckets with every tensor in memory of its own, so that training may go on changing weights.

    `live` are the storages of the state; what lies elsewhere Megatron-Core has copied already.
    """
    if request.async_fn is None or request.preload_fn is None:
        return None
    copied = []
    for path, name, (bytes_data, tensor_data) in request.preload_fn():
        tensors = [(item, one.clone() if _storage(one) in live else one) for item, one in tensor_data]
        copied.append((path, name, (bytes_data, tensors)))
    return copied


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is_tensor(shard: Any) -> bool:
    return isinstance(shard, ShardedTensor | ShardedTensorFactory)
