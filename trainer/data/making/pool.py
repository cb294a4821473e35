"""Processes that do tasks in order, whatever their number; this process is one of them.

They import neither torch nor megatron, but load a tokenizer each; this one works while they start. Knows nothing of
tasks.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import Any

_THREADS = "TOKENIZERS_PARALLELISM"  # read by the tokenizers library whenever it is given a batch
_worker: Any = None  # of this worker process
_FIRST_HERE = 3  # items that this process does while the others start, which takes them a second or two


class WorkerPool:
    """Workers of one kind; results come in order of the items, few in memory at once."""

    def __init__(self, make: Callable[..., Any], recipe: Any, here: Any, num_workers: int) -> None:
        """Work in `num_workers` processes, of which this is one; the others are started as they are needed.

        `here` is `make(recipe)`, which every process calls for itself; both must be picklable.
        """
        self._here = here
        self._depth = 2 * num_workers + 2
        self._pool: ProcessPoolExecutor | None = None
        if num_workers > 1:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(num_workers - 1, context, _start_worker, (make, recipe))

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def in_order(self, task: Callable[..., Any], items: Iterable[Any], *arguments: Any) -> Iterator[tuple[Any, Any]]:
        """Yield (item, `task(worker, item, *arguments)`) in order, worked out a bounded number ahead."""
        if self._pool is None:
            with _one_thread():
                for item in items:
                    yield item, task(self._here, item, *arguments)
            return
        source = iter(items)
        running: deque[tuple[Any, Future | None]] = deque((item, None) for item in islice(source, _FIRST_HERE))
        for item in islice(source, self._depth):
            running.append((item, self._pool.submit(_in_worker, task, item, *arguments)))
        while running:
            item, future = running[0]
            if future is None:
                future = self._do_here(task, item, *arguments)
            elif not future.done() and self._take_over(task, running, *arguments):
                continue  # it may have been the first, whose place then has another future
            running.popleft()
            result = future.result()
            for following in islice(source, 1):
                running.append((following, self._pool.submit(_in_worker, task, following, *arguments)))
            yield item, result

    def _take_over(self, task: Callable[..., Any], running: deque[tuple[Any, Future | None]], *arguments: Any) -> bool:
        """Do the first item here that no process has begun; return whether there was one."""
        for place, (item, future) in enumerate(running):
            if future is not None and future.cancel():
                running[place] = (item, self._do_here(task, item, *arguments))
                return True
        return False

    def _do_here(self, task: Callable[..., Any], item: Any, *arguments: Any) -> Future:
        """Return what a task gave, or its error, which is raised when its turn comes."""
        future: Future = Future()
        try:
            with _one_thread():
                future.set_result(task(self._here, item, *arguments))
        except Exception as error:
            future.set_exception(error)
        return future


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep the tokenizers library to one thread: as many cores are used as workers were asked for."""
    before = os.environ.get(_THREADS)
    os.environ[_THREADS] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_THREADS]
        else:
            os.environ[_THREADS] = before


def _start_worker(make: Callable[..., Any], recipe: Any) -> None:
    """Set a worker up: one thread each, Ctrl-C left to the parent, and gone when the parent is."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ[_THREADS] = "false"
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _worker = make(recipe)


def _leave_with_parent() -> None:
    """End this process with its parent: a pool's workers would otherwise wait for work for ever after a kill -9."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _in_worker(task: Callable[..., Any], item: Any, *arguments: Any) -> Any:
    assert _worker is not None
    return task(_worker, item, *arguments)
