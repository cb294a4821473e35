"""Deals replies out to worker processes in chunks, and puts others in the place of those that hang or die."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from typing import Any

from configs.errors import BadInput
from trainer.environments.process import WorkerProcess
from trainer.environments.rewards.reply import Reply
from trainer.environments.worker import Loaded, Order, Part, too_slow

_MOST_MESSAGES = 64  # of a chunk: so many fit into a connection, and no worker waits for the trainer to read
_MOST_STARTS = 3  # that fail one after the other, in one place

Keep = Callable[[int, Sequence[Part]], None]


class Workers:
    """Places for worker processes, each empty or taken."""

    def __init__(self, orders: Sequence[Order], num_workers: int, place: str) -> None:
        self._orders, self._place = orders, place
        self._workers: list[WorkerProcess | None] = [None] * num_workers
        self._failed_starts = [0] * num_workers
        self._why = ""

    def load(self) -> Loaded:
        """Start all workers anew, and return what they say of their functions. Raises BadInput where one cannot."""
        self.close()
        workers = [WorkerProcess(self._orders, self._place) for _ in self._workers]
        self._workers = list(workers)
        said: Any = None
        for worker in workers:
            worker.connection.poll(max(0.0, worker.deadline - time.monotonic()))
            said = next(iter(worker.messages()), "")
            if isinstance(said, Loaded):
                worker.is_ready = True
                continue
            how = worker.end(has_gone=said is None) if not said else ""
            self.close()
            raise BadInput(said or f"{self._place}: the functions cannot be imported: {how or 'it does not come back'}")
        assert isinstance(said, Loaded)
        return said

    def work(self, replies: Sequence[Reply], keep: Keep) -> None:
        """Score all replies; `keep(index, parts)` is called for each as it is known."""
        job = _Job(replies, len(self._orders), keep)
        try:
            while job.num_left:
                self._start_missing()
                self._give_out(job)
                busy = [worker for worker in self._workers if worker is not None and not worker.is_idle]
                if not busy:
                    job.give_up(f"no worker can be started: {self._why}")
                    return
                patience = min(worker.deadline for worker in busy) - time.monotonic()
                wait([worker.connection for worker in busy], max(0.0, patience))
                for place, worker in enumerate(self._workers):
                    if worker is not None and not worker.is_idle:
                        self._look_at(place, worker, job)
        except BaseException:
            self.close()  # what workers are at belongs to nobody any more
            raise

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers:
            if worker is not None:
                worker.end()
        self._workers = [None] * len(self._workers)

    def _start_missing(self) -> None:
        for place, worker in enumerate(self._workers):
            if worker is None and self._failed_starts[place] < _MOST_STARTS:
                self._workers[place] = WorkerProcess(self._orders, self._place)

    def _give_out(self, job: _Job) -> None:
        """Give idle workers chunks that grow smaller towards the end, so that all finish together."""
        for worker in self._workers:
            if worker is not None and worker.is_idle and job.waiting:
                size = len(job.waiting) // (2 * len(self._workers))
                size = max(1, min(size, _MOST_MESSAGES // len(self._orders)))
                worker.give([job.waiting.popleft() for _ in range(size)], job.replies)

    def _look_at(self, place: int, worker: WorkerProcess, job: _Job) -> None:
        """Take in what a worker has sent; replace it where it has gone or is too slow."""
        for message in worker.messages():
            if message is None:
                self._replace(place, worker, job, worker.end(has_gone=True))
                return
            if isinstance(message, str):  # it could import everything before, and now cannot
                self._replace(place, worker, job, message)
                return
            if isinstance(message, Loaded):
                worker.is_ready = True
            elif isinstance(message, float):
                self._failed_starts[place] = 0
                assert worker.chunk is not None
                worker.chunk.since = message
            else:
                job.take(worker, *message)
        if not worker.is_idle and time.monotonic() > worker.deadline:
            chunk = worker.chunk
            has_begun = chunk is not None and chunk.since is not None
            limit = self._orders[chunk.part].time_limit if chunk is not None else 0.0
            self._replace(place, worker, job, too_slow(limit) if has_begun else "it does not start")

    def _replace(self, place: int, worker: WorkerProcess, job: _Job, why: str) -> None:
        """End a worker; the reply that it was at has a fault, and others take over what else it had."""
        worker.end()
        self._workers[place] = None
        if worker.chunk is None or worker.chunk.since is None:
            self._failed_starts[place] += 1
            self._why = why
        job.take_back(worker, why)


class _Job:
    """Replies that are being scored, and what is known of them."""

    def __init__(self, replies: Sequence[Reply], num_rewards: int, keep: Keep) -> None:
        self.replies, self.num_rewards, self.keep = replies, num_rewards, keep
        self.waiting = deque(range(len(replies)))
        self.num_left = len(replies)
        self._parts: dict[int, list[Part]] = {}

    def take(self, worker: WorkerProcess, part: Part, since: float) -> None:
        """Take in what the reward that a worker was at came to; `since` is when it began the next one."""
        chunk = worker.chunk
        assert chunk is not None
        index = chunk.indices[chunk.place]
        self._parts.setdefault(index, []).append(part)
        chunk.part, chunk.since = chunk.part + 1, since
        if chunk.part == self.num_rewards:
            chunk.place, chunk.part = chunk.place + 1, 0
            if chunk.place == len(chunk.indices):
                worker.chunk = None
            self._finish(index)

    def take_back(self, worker: WorkerProcess, why: str) -> None:
        """Take the rest of a chunk back; the reward that its worker was at has failed."""
        chunk = worker.chunk
        if chunk is None:
            return
        rest = list(chunk.indices[chunk.place :])
        if chunk.since is not None:
            index = rest.pop(0)
            self._parts.setdefault(index, []).append(Part(None, why))
            self._finish(index)
        self.waiting.extendleft(reversed(rest))

    def give_up(self, why: str) -> None:
        """Let all that is left fail."""
        while self.waiting:
            index = self.waiting.popleft()
            self._parts.setdefault(index, []).append(Part(None, why))
            self._finish(index)

    def _finish(self, index: int) -> None:
        parts = self._parts.pop(index)
        self.num_left -= 1
        self.keep(index, [*parts, *[Part(None)] * (self.num_rewards - len(parts))])
