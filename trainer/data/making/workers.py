"""Worker processes that turn blocks of documents into tokens, in order whatever their number.

Workers import neither torch nor megatron, so that starting them costs a fraction of a second. Knows nothing of parts.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import BadInput
from trainer.data.making.documents import Block, InputFile, texts_of
from trainer.data.making.parts import TokenizedBlock, hash_file
from trainer.data.tokenizer import Tokenizer, load_tokenizer

_HASHED_AT_ONCE = 64


@dataclass(frozen=True)
class BlockSample:
    """What verification needs of a block: its size and a few documents tokenized again."""

    num_documents: int
    tokens: list[tuple[int, NDArray[np.int64], bool]]  # place in the block, token ids, whether they decode to the text


def token_dtype(vocab_size: int) -> type[np.integer]:
    """Return the smallest dtype megatron-core uses for ids below `vocab_size` (its `DType.optimal_dtype`)."""
    return np.uint16 if vocab_size < 65500 else np.int32


def tokenize_block(block: Block, tokenizer: Tokenizer, text_key: str) -> TokenizedBlock:
    """Tokenize the documents of a block, each followed by the end-of-document token; empty ones are left out."""
    texts = list(texts_of(block, text_key))
    kept = [text for text in texts if text]
    documents = tokenizer.encode_batch(kept)
    for ids in documents:
        ids.append(tokenizer.eod_id)
    lengths = np.fromiter(map(len, documents), dtype=np.int32, count=len(documents))
    dtype = token_dtype(tokenizer.vocab_size)
    tokens = b"".join(np.array(ids, dtype=dtype).tobytes() for ids in documents)
    num_text_bytes = sum(len(text.encode()) for text in kept)
    return TokenizedBlock(tokens, lengths, len(texts) - len(kept), num_text_bytes)


def sample_block(block: Block, tokenizer: Tokenizer, text_key: str, every: int) -> BlockSample:
    """Tokenize every `every`-th document of a block again and count them all."""
    kept = [text for text in texts_of(block, text_key) if text]
    chosen = range(0, len(kept), every)
    tokens = []
    for place, ids in zip(chosen, tokenizer.encode_batch([kept[place] for place in chosen]), strict=True):
        same_text = tokenizer.decode(ids) == kept[place]
        tokens.append((place, np.array([*ids, tokenizer.eod_id], dtype=np.int64), same_text))
    return BlockSample(len(kept), tokens)


class DocumentWorkers:
    """A pool of workers with one tokenizer; results come in order of the blocks, few in memory at once."""

    def __init__(self, tokenizer_directory: str, text_key: str, num_workers: int) -> None:
        """Start `num_workers` processes as they are needed."""
        self._text_key = text_key
        self._depth = 2 * num_workers + 2
        self._pool = ProcessPoolExecutor(
            num_workers, multiprocessing.get_context("spawn"), _start_worker, (tokenizer_directory,)
        )

    def __enter__(self) -> DocumentWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def tokenize(self, blocks: Iterable[Block]) -> Iterator[tuple[Block, TokenizedBlock]]:
        """Tokenize blocks, in order. Raises BadInput as `documents.texts_of` does."""
        return self._in_order(_tokenize_here, blocks, self._text_key)

    def sample(self, blocks: Iterable[Block], every: int) -> Iterator[tuple[Block, BlockSample]]:
        """Tokenize every `every`-th document of each block again, in order."""
        return self._in_order(_sample_here, blocks, self._text_key, every)

    def hash_files(self, files: list[InputFile]) -> list[str]:
        """Compute the SHA-256 of each file, in order."""
        groups = [files[start : start + _HASHED_AT_ONCE] for start in range(0, len(files), _HASHED_AT_ONCE)]
        return [value for _, group in self._in_order(_hash_here, groups) for value in group]

    def _in_order(self, task: Callable[..., Any], items: Iterable[Any], *arguments: Any) -> Iterator[tuple[Any, Any]]:
        """Run `task(item, *arguments)` in the workers and yield (item, result) in order, a bounded number ahead."""
        source = iter(items)
        running: deque[tuple[Any, Future]] = deque()
        for item in islice(source, self._depth):
            running.append((item, self._pool.submit(task, item, *arguments)))
        while running:
            item, future = running.popleft()
            result = future.result()
            for following in islice(source, 1):
                running.append((following, self._pool.submit(task, following, *arguments)))
            yield item, result


_tokenizer: Tokenizer | None = None  # of this worker process


def _start_worker(tokenizer_directory: str) -> None:
    """Set a worker up: one thread each, Ctrl-C left to the parent, and gone when the parent is."""
    global _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _tokenizer = load_tokenizer(tokenizer_directory)


def _leave_with_parent() -> None:
    """End this process with its parent: a pool's workers would otherwise wait for work for ever after a kill -9."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _tokenize_here(block: Block, text_key: str) -> TokenizedBlock:
    return tokenize_block(block, _loaded(), text_key)


def _sample_here(block: Block, text_key: str, every: int) -> BlockSample:
    return sample_block(block, _loaded(), text_key, every)


def _hash_here(files: list[InputFile]) -> list[str]:
    try:
        return [hash_file(file.path) for file in files]
    except OSError as error:
        raise BadInput(f"input {error.filename}: cannot be read ({error.strerror}); check its permissions") from error


def _loaded() -> Tokenizer:
    assert _tokenizer is not None
    return _tokenizer
