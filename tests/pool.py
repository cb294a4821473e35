"""Worker processes that stay alive between tests, forked from a server that imports torch and Megatron-Core once.

Torch-free here: the server imports it. A case is a module-level function `case(place, *args)`, sent by name.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

START_SECONDS = 300
GRACE_SECONDS = 10


def fork_server() -> ForkServerContext:
    """Return the server, a process of its own without threads that starts, and imports, at the first fork."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    return context


@dataclass(frozen=True)
class Place:
    """Where a case runs: its rank among the ranks of the case, and the file through which they meet."""

    rank: int
    world_size: int
    init_method: str


class RankFailed(AssertionError):
    """A rank of a case raised, died or did not answer; the message names it."""


@dataclass
class _Worker:
    process: Any
    connection: Connection


class RankPool:
    """Up to `largest` workers, started when a case first needs them; a case runs on the first `world` of them."""

    def __init__(self, largest: int = 8) -> None:
        self._largest = largest
        self._workers: list[_Worker] = []
        self._scratch = tempfile.TemporaryDirectory(prefix="ranks-")
        self._num_cases = 0

    def run(self, case: Callable[..., Any], *args: Any, world: int = 1, timeout: float = 90) -> list[Any]:
        """Run `case(place, *args)` on `world` ranks and return the results by rank.

        Raises RankFailed with the traceback of the rank that failed first. Workers that hang or die are replaced.
        """
        self._grow(world)
        self._num_cases += 1
        meeting = Path(self._scratch.name) / f"case_{self._num_cases}"
        name = (case.__module__, case.__qualname__)
        for rank, worker in enumerate(self._workers[:world]):
            place = Place(rank, world, meeting.as_uri())
            worker.connection.send_bytes(pickle.dumps((*name, place, args)))
        answers, failures = self._collect(world, timeout)
        meeting.unlink(missing_ok=True)
        if failures:
            raise RankFailed(f"{case.__name__} on {world} ranks\n" + "\n".join(failures))
        return [answers[rank] for rank in range(world)]

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers:
            worker.connection.close()
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
        self._workers = []

    def _collect(self, world: int, timeout: float) -> tuple[dict[int, Any], list[str]]:
        """Wait for all ranks; after the first failure the others get a short grace, since they may wait for it."""
        waiting = {worker.connection: rank for rank, worker in enumerate(self._workers[:world])}
        answers: dict[int, Any] = {}
        failures: list[str] = []
        is_pool_lost = False
        deadline = time.monotonic() + timeout
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                ranks = sorted(waiting.values())
                failures.append(f"rank {', '.join(map(str, ranks))} did not answer in time and was killed")
                is_pool_lost = True
                break
            for connection in ready:
                rank = waiting.pop(connection)  # type: ignore[call-overload]
                try:
                    is_done, answer = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
                except (EOFError, ConnectionError):
                    self._workers[rank].process.join(GRACE_SECONDS)
                    is_pool_lost = True
                    is_done, answer = False, f"died with exit code {self._workers[rank].process.exitcode}"
                if is_done:
                    answers[rank] = answer
                    continue
                failures.append(f"rank {rank}: {answer}")
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if is_pool_lost:
            self.close()
        return answers, failures

    def _grow(self, world: int) -> None:
        assert world <= self._largest, f"a case wants {world} ranks, the pool has at most {self._largest}"
        if any(not worker.process.is_alive() for worker in self._workers):
            self.close()
        context = fork_server()
        started = []
        while len(self._workers) < world:
            ours, theirs = context.Pipe()
            name = f"rank-{len(self._workers)}"
            process = context.Process(target=_serve, args=(theirs,), name=name, daemon=True)
            process.start()
            theirs.close()
            self._workers.append(_Worker(process, ours))
            started.append(ours)
        for connection in started:
            if not connection.poll(START_SECONDS) or connection.recv_bytes() != b"ready":
                self.close()
                raise RankFailed(f"a worker did not start within {START_SECONDS} s")


def _serve(connection: Connection) -> None:
    """Run cases until the pool goes away."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; pytest ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    importlib.import_module("tests.preloaded")  # done, unless the server did not find it
    connection.send_bytes(b"ready")
    while True:
        try:
            module, name, place, args = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        try:
            answer = (True, getattr(importlib.import_module(module), name)(place, *args))
        except BaseException:
            answer = (False, traceback.format_exc())
        finally:
            _forget_world()
        connection.send_bytes(pickle.dumps(answer))


def _end_with_parent() -> None:
    """Leave as soon as pytest is gone, however it went, even in the middle of a collective."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _forget_world() -> None:
    """Destroy what a case left behind: process groups and Megatron-Core's global state."""
    import torch.distributed as dist
    from megatron.core import num_microbatches_calculator, tensor_parallel
    from megatron.core.transformer.moe.moe_logging import set_moe_metrics_tracker

    from parallel.mesh import destroy_mesh

    with contextlib.suppress(Exception):
        destroy_mesh()
    num_microbatches_calculator.unset_num_microbatches_calculator()
    tensor_parallel.get_cuda_rng_tracker().reset()
    set_moe_metrics_tracker(None)  # clearing it would keep the last model's number of layers
    if dist.is_initialized():
        with contextlib.suppress(Exception):
            dist.destroy_process_group()
    gc.collect()
