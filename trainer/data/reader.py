"""What one data-parallel rank reads: its rows of every step's samples, read ahead by a thread, and validation samples.

Every rank reads its own rows from the memory map; nothing is sent between ranks. Knows nothing of devices or models.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from configs.errors import BadInput
from trainer.data.batch import Batch, build_batch, build_packed_batch, without_loss
from trainer.data.blend import Blend
from trainer.data.indexed import TokenDataset
from trainer.data.packed_source import POSITIONS, SOURCES

Finish = Callable[[Batch], Batch]
"""Adds to a microbatch what a stage needs beside."""
_VALIDATION_SEED = 0  # the same validation samples whatever the seed of the run, so that runs can be compared


class BatchReader:
    """Hands out training steps in order. Global sample consumed + m*(mbs*dp) + r*mbs + i is row i of microbatch m of
    data-parallel rank r, so the samples of a step are the same on every layout."""

    def __init__(
        self,
        blend: Blend,
        *,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        global_batch_size_at: Callable[[int], int],
        vocab_size: int,
        document_end_id: int | None = None,
        prefetch_steps: int = 2,
        finish: Finish | None = None,
    ) -> None:
        """Read `blend` for one rank; `global_batch_size_at` maps samples consumed to the size of the step that follows.

        `document_end_id` switches document masks on (see `build_batch`); `prefetch_steps` bounds the read-ahead;
        `finish` adds to every microbatch what a stage needs beside.
        """
        self._blend = blend
        self._micro_batch_size = micro_batch_size
        self._dp_rank = dp_rank
        self._dp_size = dp_size
        self._global_batch_size_at = global_batch_size_at
        self._vocab_size = vocab_size
        self._document_end_id = document_end_id
        self._prefetch_steps = prefetch_steps
        self._finish = finish
        self._state = blend.state_dict()  # after the last step handed out; the blend itself runs ahead
        self._ready: queue.Queue[tuple[list[Batch], dict[str, Any]] | BaseException] | None = None
        self._first: Any = None  # what `check` has taken out
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def consumed_samples(self) -> int:
        """Global samples of all steps handed out so far."""
        return self._state["consumed_samples"]

    def check(self) -> None:
        """Read the next step ahead and raise what is wrong with it; `read_step` then hands it out."""
        if self._first is None:
            self._first = self._take()

    def read_step(self) -> list[Batch]:
        """Return the microbatches of the next step for this rank. An error of the reading thread is raised here."""
        item, self._first = self._first or self._take(), None
        batches, self._state = item
        return batches

    def _take(self) -> Any:
        """Return the next step and the ledger after it."""
        if self._thread is None:
            self._start()
        assert self._ready is not None
        item = self._ready.get()
        if isinstance(item, BaseException):
            self.close()
            raise item
        return item

    def state_dict(self) -> dict[str, Any]:
        """Return the ledger after the last step handed out, as plain data; the same on every rank."""
        return self._state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a ledger; what was read ahead is dropped. Raises BadInput as `Blend.load_state_dict` does."""
        self.close()
        self._blend.load_state_dict(state)
        self._state = self._blend.state_dict()

    def close(self) -> None:
        """Stop the reading thread; the next `read_step` starts it again after the last step handed out."""
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        self._thread, self._ready, self._first = None, None, None
        self._blend.load_state_dict(self._state)

    def _start(self) -> None:
        self._stop = threading.Event()
        self._ready = queue.Queue(maxsize=self._prefetch_steps)
        self._thread = threading.Thread(target=self._read_ahead, args=(self._ready, self._stop), daemon=True)
        self._thread.start()

    def _read_ahead(self, ready: queue.Queue, stop: threading.Event) -> None:
        """Read steps into `ready` until told to stop; the first error takes the place of a step."""
        while not stop.is_set():
            try:
                item: Any = (self._next_step(), self._blend.state_dict())
            except BaseException as error:  # raised again in the caller's thread
                item = error
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return

    def _next_step(self) -> list[Batch]:
        size = self._global_batch_size_at(self._blend.consumed_samples)
        per_microbatch = self._micro_batch_size * self._dp_size
        if size < 1 or size % per_microbatch:
            raise BadInput(
                f"train.global_batch_size: {size} is not a multiple of train.micro_batch_size * dp = {per_microbatch}; "
                f"a value that would work: {max(size // per_microbatch, 1) * per_microbatch}"
            )
        assignment = self._blend.take(size)
        rows = np.arange(size).reshape(-1, self._dp_size, self._micro_batch_size)[:, self._dp_rank]  # [microbatch, mbs]
        read = self._blend.read(assignment, rows.reshape(-1))
        samples = read.reshape(*rows.shape, *read.shape[1:])
        check_ids(read, self._vocab_size, f"data.train: a token of the samples {assignment.first_sample} to +{size}")
        ids = rows + assignment.first_sample
        return [
            _build(own, tuple(id_row.tolist()), self._document_end_id, self._finish)
            for own, id_row in zip(samples, ids, strict=True)
        ]


class ValidationReader:
    """The fixed first samples of one validation source: each counted once, with equal microbatches on every rank."""

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        seq_len: int,
        num_samples: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        vocab_size: int,
        document_end_id: int | None = None,
        packing: str = "concat",
        finish: Finish | None = None,
    ) -> None:
        """Read at most `num_samples` of `dataset`, fewer when it has fewer: none is read twice."""
        self.source = SOURCES[packing](dataset, seq_len, _VALIDATION_SEED, field="data.validation")
        self.num_samples = min(num_samples, self.source.num_samples)
        self._micro_batch_size = micro_batch_size
        self._dp_rank = dp_rank
        self._dp_size = dp_size
        self._vocab_size = vocab_size
        self._document_end_id = document_end_id
        self._finish = finish

    @property
    def num_microbatches(self) -> int:
        """Microbatches of each rank."""
        return -(-self.num_samples // (self._micro_batch_size * self._dp_size))

    def check(self) -> None:
        """Read every sample and raise what is wrong with it."""
        for _ in self.batches():
            pass

    def batches(self) -> Iterator[Batch]:
        """Yield this rank's microbatches; rows past the last sample repeat it with a loss mask of 0."""
        for number in range(self.num_microbatches):
            first = (number * self._dp_size + self._dp_rank) * self._micro_batch_size
            samples = np.arange(first, first + self._micro_batch_size, dtype=np.int64)
            own = self.source.read(np.minimum(samples, self.num_samples - 1))
            check_ids(own, self._vocab_size, f"data.validation: a token of {self.source.dataset.prefix}")
            batch = _build(own, tuple(samples.tolist()), self._document_end_id, self._finish)
            kept = max(self.num_samples - first, 0)
            yield batch if kept >= self._micro_batch_size else without_loss(batch, kept)


def _build(
    samples: np.ndarray, sample_ids: tuple[int, ...], document_end_id: int | None, finish: Finish | None
) -> Batch:
    """Build the batch of windows `[micro_batch, seq + 1]` or of packed rows `[micro_batch, 3 to 5, seq]`."""
    if samples.ndim == 3:
        batch = build_packed_batch(samples, sample_ids)
    else:
        batch = build_batch(samples, sample_ids, document_end_id)
    return batch if finish is None else finish(batch)


def check_ids(samples: np.ndarray, vocab_size: int, what: str) -> None:
    """Refuse token ids the model has no embedding for: split over tp, an embedding would take them for nothing."""
    ids = samples[:, :POSITIONS] if samples.ndim == 3 else samples  # packed rows hold positions too, and sides
    largest = int(ids.max(initial=0))
    if largest >= vocab_size:
        raise BadInput(
            f"{what} is {largest}, and model.vocab_size={vocab_size} has no such id; set model.vocab_size to the size "
            "of the tokenizer the data was made with"
        )
