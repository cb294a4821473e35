"""Workers that turn blocks of documents into tokens, in order whatever their number; one works in this process.

They import neither torch nor megatron, so that starting them costs a fraction of a second. Knows nothing of parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from configs.errors import BadInput
from trainer.data.making.documents import Block, InputFile, texts_of
from trainer.data.making.parts import TokenizedBlock, hash_file
from trainer.data.making.pool import WorkerPool
from trainer.data.tokenizer import Tokenizer, load_tokenizer

_HASHED_AT_ONCE = 64


@dataclass(frozen=True)
class Recipe:
    """What a dataset is made by, its inputs apart."""

    tokenizer: str  # directory
    text_key: str = "text"
    skip_missing: bool = False
    """Leave records without text out, and count them, instead of refusing the input."""
    eod: str | None = None
    """The token that ends a document; None: the tokenizer's eos token."""
    bos: bool = False
    """Whether the tokenizer's BOS token begins every document."""

    def load_tokenizer(self) -> Tokenizer:
        """Load the tokenizer with the tokens around a document. Raises BadInput."""
        return load_tokenizer(self.tokenizer, eod=self.eod, bos=self.bos)


@dataclass(frozen=True)
class BlockSample:
    """What verification needs of a block: its size and a few documents tokenized again."""

    num_documents: int
    tokens: list[tuple[int, NDArray[np.int64], bool]]  # place in the block, token ids, whether they decode to the text


def token_dtype(vocab_size: int) -> type[np.integer]:
    """Return the smallest dtype megatron-core uses for ids below `vocab_size` (its `DType.optimal_dtype`)."""
    return np.uint16 if vocab_size < 65500 else np.int32


class Worker:
    """One process's tokenizer, and the tasks it does with it."""

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer) -> None:
        """Work with a tokenizer loaded by the recipe."""
        self._recipe = recipe
        self._tokenizer = tokenizer
        self._dtype = token_dtype(tokenizer.vocab_size)

    def tokenize(self, block: Block) -> TokenizedBlock:
        """Tokenize the documents of a block with the tokens around them; empty ones and missing ones are left out."""
        texts = list(texts_of(block, self._recipe.text_key, skip_missing=self._recipe.skip_missing))
        kept = [text for text in texts if text]
        documents = self._tokenizer.encode_documents(kept)
        lengths = np.fromiter(map(len, documents), dtype=np.int32, count=len(documents))
        tokens = b"".join(np.array(ids, dtype=self._dtype).tobytes() for ids in documents)
        num_text_bytes = sum(len(text.encode()) for text in kept)
        num_missing = texts.count(None)
        return TokenizedBlock(tokens, lengths, len(texts) - len(kept) - num_missing, num_text_bytes, num_missing)

    def sample(self, block: Block, every: int) -> BlockSample:
        """Tokenize every `every`-th document of a block again and count them all."""
        texts = texts_of(block, self._recipe.text_key, skip_missing=self._recipe.skip_missing)
        kept = [text for text in texts if text]
        chosen = range(0, len(kept), every)
        tokens = []
        for place, ids in zip(chosen, self._tokenizer.encode_documents([kept[n] for n in chosen]), strict=True):
            same_text = self._tokenizer.decode(ids) == kept[place]
            tokens.append((place, np.array(ids, dtype=np.int64), same_text))
        return BlockSample(len(kept), tokens)

    def hash(self, files: list[InputFile]) -> list[str]:
        """Compute the SHA-256 of each file."""
        try:
            return [hash_file(file.path) for file in files]
        except OSError as error:
            reason = f"cannot be read ({error.strerror}); check its permissions"
            raise BadInput(f"input {error.filename}: {reason}") from error


def start_worker(recipe: Recipe) -> Worker:
    """Return a worker with a tokenizer of its own."""
    return Worker(recipe, recipe.load_tokenizer())


class DocumentWorkers:
    """A pool of workers with one tokenizer each; results come in order of the blocks, few in memory at once."""

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer, num_workers: int) -> None:
        """Work in `num_workers` processes, started as they are needed; a single one is this process itself.

        `tokenizer` is the recipe's, loaded.
        """
        self._pool = WorkerPool(start_worker, recipe, Worker(recipe, tokenizer), num_workers)

    def __enter__(self) -> DocumentWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()

    def tokenize(self, blocks: Iterable[Block]) -> Iterator[tuple[Block, TokenizedBlock]]:
        """Tokenize blocks, in order. Raises BadInput as `documents.texts_of` does."""
        return self._pool.in_order(Worker.tokenize, blocks)

    def sample(self, blocks: Iterable[Block], every: int) -> Iterator[tuple[Block, BlockSample]]:
        """Tokenize every `every`-th document of each block again, in order."""
        return self._pool.in_order(Worker.sample, blocks, every)

    def hash_files(self, files: list[InputFile]) -> list[str]:
        """Compute the SHA-256 of each file, in order."""
        groups = [files[start : start + _HASHED_AT_ONCE] for start in range(0, len(files), _HASHED_AT_ONCE)]
        return [value for _, group in self._pool.in_order(Worker.hash, groups) for value in group]
