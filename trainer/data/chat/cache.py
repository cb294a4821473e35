"""Sources of conversations as tokenised datasets in a cache: one for each content, template, tokenizer and rule.

The first start makes them, with many processes; later ones find them at once. Torch-free.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import BadInput, PeerLost
from configs.sections.comparisons import ComparisonsSection
from configs.sections.data import DataConfig, SourceConfig
from configs.stages import ComparisonsConfig, SftConfig
from trainer.data.chat.preference_worker import open_worker
from trainer.data.chat.rows import iter_blocks, list_chat_files
from trainer.data.chat.template import load_template
from trainer.data.chat.worker import ConversationWorker, Recipe
from trainer.data.dataset_files import MARGINS_SUFFIX, MASK_SUFFIX, DatasetMeta, check_sizes, read_meta
from trainer.data.index_file import write_index
from trainer.data.indexed import TokenDataset
from trainer.data.making.documents import BLOCK_BYTES, describe_left_out
from trainer.data.making.parts import hash_file
from trainer.data.making.pool import WorkerPool
from trainer.data.making.workers import token_dtype
from trainer.data.packed_source import SOURCES
from trainer.data.tokenizer import load_tokenizer
from trainer.disk.heartbeat import SILENCE_SECONDS, Heartbeat, Listener

log = logging.getLogger(__name__)
_FORMAT = 1  # raise it when the same settings give other samples
_SECONDS_BETWEEN_NEWS = 5.0
SUMMARY_SUFFIX = ".summary.json"


@dataclass(frozen=True)
class Summary:
    """What became of the rows of a source."""

    num_rows: int
    num_samples: int
    num_tokens: int
    num_trained_tokens: int
    num_truncated: int
    """Samples cut at their end."""
    dropped: dict[str, int]
    """Rows, or parts of them, left out by reason."""
    remarks: dict[str, int]
    """Samples in which something is not as the data has it, by what."""


class TokenisedSource(SourceConfig):
    """A dataset of the cache."""

    conversations: str
    """What it was made of."""

    @property
    def origin(self) -> str:
        """The file or folder of conversations."""
        return self.conversations


def prepare_conversations(config: SftConfig | ComparisonsConfig, *, is_maker: bool = True) -> DataConfig:
    """Return what the run reads: tokenised datasets in the place of the config's conversations.

    What the cache lacks is made, by processes with `is_maker`; the others wait for it. Raises BadInput, and PeerLost
    where nobody makes it any more.
    """
    sources: dict[str, tuple[SourceConfig, ...]] = {}
    for split in ("train", "validation"):
        recipes = [
            Recipe.of(config, f"{config.source_field(split)}[{number}]", source)
            for number, source in enumerate(config.sources(split))
        ]
        datasets = [TokenDataset(prepare_source(recipe, is_maker=is_maker)) for recipe in recipes]
        _check_different(recipes, datasets)
        sources[split] = tuple(
            TokenisedSource(path=dataset.prefix, weight=_weight(recipe, dataset), conversations=recipe.source.path)
            for recipe, dataset in zip(recipes, datasets, strict=True)
        )
    fields = {**sources, "packing": config.packing, "document_mask": True}
    return config.data.model_copy(update=fields)


def prepare_source(recipe: Recipe, *, is_maker: bool = True) -> str:
    """Return the prefix of the dataset of one source, made now unless the cache has it.

    Without `is_maker` others make it. Raises BadInput, and PeerLost where they are gone.
    """
    settings = list(_settings(recipe))
    cache, quick = Path(recipe.chats.cache), _quick_key(recipe, settings)
    known, maker = cache / f"{quick}.key", cache / f".{quick}.maker"
    listener = None if is_maker else Listener(maker)
    while True:
        prefix = _find_known(recipe, known)
        if prefix is not None:
            if is_maker:
                _tell_known(recipe, prefix)
            return prefix
        if listener is None:
            break
        _check_is_made(recipe, listener)
        time.sleep(0.5)
    with _writing(recipe):
        cache.mkdir(parents=True, exist_ok=True)
    with Heartbeat(maker):
        key = _content_key(recipe, settings)
        prefix = str(cache / key / recipe.source.name)
        with _held(recipe, key):
            if _is_whole(prefix):
                _tell_known(recipe, prefix)
            else:
                _make(recipe, cache, key, recipe.source.name, quick)
            with _writing(recipe):
                _write_whole(known, key)
    return prefix


def read_summary(prefix: str) -> Summary:
    """Read what became of the rows of a source."""
    return Summary(**json.loads(Path(prefix + SUMMARY_SUFFIX).read_bytes()))


def _find_known(recipe: Recipe, known: Path) -> str | None:
    """Return the prefix of the dataset that the file `known` names; None where there is none, or it is not whole."""
    if not known.is_file():
        return None
    prefix = str(known.parent / known.read_text(encoding="utf-8", errors="replace") / recipe.source.name)
    return prefix if _is_whole(prefix) else None


def _check_is_made(recipe: Recipe, listener: Listener) -> None:
    """Raise BadInput where the rank that tokenises a source has failed, PeerLost where it is gone."""
    reason = listener.find_failure()
    if reason is not None:
        raise BadInput(f"{recipe.source.path} could not be tokenised by another rank: {reason}")
    if listener.is_silent:
        raise PeerLost(
            f"{recipe.field}: the rank that tokenises {recipe.source.path} for this one has not been heard of for "
            f"{SILENCE_SECONDS:.0f} seconds; look at why it ended, and give the same command again"
        )


def _is_whole(prefix: str) -> bool:
    """Return whether a dataset of the cache is there and nothing of it is missing or cut off."""
    try:
        check_sizes(prefix)
        read_summary(prefix)
        meta = read_meta(prefix)
    except (BadInput, OSError, ValueError, TypeError):
        return False
    return meta is not None and meta.mask_sha256 is not None  # without it every token would count as trained


def _tell_known(recipe: Recipe, prefix: str) -> None:
    """Say where the cache has a source, and again what became of its rows. Raises BadInput for other content."""
    meta = read_meta(prefix)
    assert meta is not None
    files = {".bin": meta.bin_sha256, ".idx": meta.idx_sha256, MASK_SUFFIX: meta.mask_sha256}
    if meta.margins_sha256 is not None:
        files[MARGINS_SUFFIX] = meta.margins_sha256
    for suffix, expected in files.items():
        if hash_file(prefix + suffix) != expected:
            raise BadInput(
                f"{recipe.section}.cache: {prefix}{suffix} has changed since it was written (SHA-256 differs); delete "
                f"{os.path.dirname(prefix)}, and the same command makes it again"
            )
    log.info("%s is tokenised in %s: %s", recipe.source.path, prefix, describe(read_summary(prefix)))


def _check_different(recipes: Sequence[Recipe], datasets: Sequence[TokenDataset]) -> None:
    """Refuse two sources of one split that become the same tokens and masks."""
    seen: dict[str, str] = {}
    for recipe, dataset in zip(recipes, datasets, strict=True):
        path, other = recipe.source.path, seen.setdefault(dataset.identity, recipe.source.path)
        if path != other:
            raise BadInput(
                f"{recipe.field}: {path} holds the same conversations as {other}; list one of them and raise its weight"
            )


def _weight(recipe: Recipe, dataset: TokenDataset) -> float:
    """Return the source's weight, by default as many rows as it fills, so that an epoch reads each of them once."""
    if recipe.source.weight is not None:
        return recipe.source.weight
    return float(SOURCES[recipe.chats.rows](dataset, recipe.seq_len, seed=0).num_samples)


def _make(recipe: Recipe, cache: Path, key: str, name: str, quick: str) -> None:
    """Tokenise a source and rename the result into place, beside what the same rows gave under another name.

    Raises BadInput where its files have changed since their keys were made.
    """
    folder = cache / f".{key}.making"
    shutil.rmtree(folder, ignore_errors=True)  # what a kill has left; the cache is held
    try:
        with _writing(recipe):
            folder.mkdir(parents=True)
            _tokenise(recipe, folder / name)
            if _quick_key(recipe, list(_settings(recipe))) != quick:
                raise BadInput(
                    f"{recipe.field}: {recipe.source.path} has changed while it was read; start again when it is whole"
                )
            (cache / key).mkdir(exist_ok=True)
            # The summary comes last: it says that all is there.
            for file in sorted(folder.iterdir(), key=lambda file: file.name.endswith(SUMMARY_SUFFIX)):
                os.replace(file, cache / key / file.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _tokenise(recipe: Recipe, prefix: Path) -> None:
    """Write the dataset of a source, its mask and its summary."""
    worker = open_worker(recipe)
    tokenizer = worker.tokenizer
    num_workers = recipe.chats.num_workers or len(os.sched_getaffinity(0))
    files, left_out = list_chat_files(recipe.source, recipe.field)
    if left_out:
        log.info(
            "%s: left out: %s; to read another split, name its folder", recipe.source.path, describe_left_out(left_out)
        )
    num_bytes = sum(file.num_bytes for file in files)
    pool = WorkerPool(type(worker), recipe, worker, min(num_workers, -(-num_bytes // BLOCK_BYTES)))
    dropped: Counter[str] = Counter()
    remarks: Counter[str] = Counter()
    lengths: list[np.ndarray] = []
    margins: list[np.ndarray] = []
    num_rows = num_truncated = num_trained = 0
    news = _News(recipe.source.path, num_bytes)
    try:
        with open(f"{prefix}.bin", "wb") as tokens, open(f"{prefix}{MASK_SUFFIX}", "wb") as mask:
            for rows, block in pool.in_order(ConversationWorker.pack, iter_blocks(recipe.source, recipe.field)):
                tokens.write(block.tokens)
                mask.write(block.mask)
                lengths.append(block.lengths)
                margins.append(block.margins)
                dropped += block.dropped
                remarks += block.remarks
                num_rows, num_truncated = num_rows + block.num_rows, num_truncated + block.num_truncated
                num_trained += len(block.mask) - block.mask.count(0)
                news.tell(num_rows, rows.num_disk_bytes)
    finally:
        pool.close()
    num_samples = sum(map(len, lengths))
    if not num_samples:
        reasons = ", ".join(f"{count} rows: {reason}" for reason, count in dropped.most_common(3))
        raise BadInput(f"{recipe.field}: {recipe.source.path} gives no sample ({reasons or 'it has no rows'})")
    dtype = token_dtype(tokenizer.vocab_size)
    write_index(Path(f"{prefix}.idx"), dtype, lengths)
    num_tokens = int(sum(int(part.sum()) for part in lengths))
    summary = Summary(num_rows, num_samples, num_tokens, num_trained, num_truncated, dict(dropped), dict(remarks))
    _write_whole(Path(f"{prefix}{SUMMARY_SUFFIX}"), json.dumps(asdict(summary), indent=1, ensure_ascii=False) + "\n")
    DatasetMeta(
        vocabulary_hash=tokenizer.vocabulary_hash,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        dtype=dtype.__name__,
        num_documents=num_samples,
        num_tokens=num_tokens,
        num_empty_documents=0,
        fingerprint="",
        bin_sha256=hash_file(f"{prefix}.bin"),
        idx_sha256=hash_file(f"{prefix}.idx"),
        mask_sha256=hash_file(f"{prefix}{MASK_SUFFIX}"),
        margins_sha256=_write_margins(recipe, prefix, np.concatenate(margins)),
    ).write(Path(f"{prefix}.meta.json"))
    news.finish(summary)


def _write_margins(recipe: Recipe, prefix: Path, margins: np.ndarray) -> str | None:
    """Write the margins of samples and return their hash, where anything reads them and they are not all 0."""
    if recipe.chats.rows != "scored_pairs" or not margins.any():
        return None
    margins.astype(np.float32).tofile(f"{prefix}{MARGINS_SUFFIX}")
    return hash_file(f"{prefix}{MARGINS_SUFFIX}")


class _News:
    """Tells how far a source is, every few seconds, and what became of it."""

    def __init__(self, path: str, num_bytes: int) -> None:
        self._path, self._num_bytes, self._done = path, num_bytes, 0
        self._started = self._last = time.monotonic()

    def tell(self, num_rows: int, num_bytes: int) -> None:
        """Say that so many rows are done in all, and so many bytes more."""
        self._done += num_bytes
        now = time.monotonic()
        if now - self._last > _SECONDS_BETWEEN_NEWS:
            self._last = now
            rate = num_rows / (now - self._started)
            share = 100 * self._done / max(self._num_bytes, 1)
            log.info("tokenising %s: %.0f %%, %d rows, %.0f a second", self._path, share, num_rows, rate)

    def finish(self, summary: Summary) -> None:
        """Say what became of all rows."""
        log.info("tokenised %s in %.1f s: %s", self._path, time.monotonic() - self._started, describe(summary))


def describe(summary: Summary) -> str:
    """Return a summary in words."""
    share = summary.num_trained_tokens / max(summary.num_tokens, 1)
    text = f"{summary.num_rows:,} rows, {summary.num_samples:,} samples, {summary.num_tokens:,} tokens, "
    text += f"{share:.0%} of them trained"
    if summary.num_truncated:
        text += f"; {summary.num_truncated:,} samples cut at train.seq_len"
    for reason, count in sorted(summary.dropped.items(), key=lambda item: -item[1]):
        text += f"; {count:,} left out: {reason}"
    for remark, count in summary.remarks.items():
        text += f"; in {count:,} samples {remark}"
    return text


def _quick_key(recipe: Recipe, settings: Sequence[Any]) -> str:
    """Return a key that changes with the files' names, sizes and times, without reading them.

    The time of the last change to the inode is among them: programs that copy set that of the last writing back.
    """
    found = [(os.path.abspath(path), os.stat(path)) for path in _files(recipe)]
    files = [(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns) for path, status in found]
    return _digest([files, *settings])


def _content_key(recipe: Recipe, settings: Sequence[Any]) -> str:
    """Return a key that changes with what is in the files. Raises BadInput where one cannot be read."""
    try:
        files = [(os.path.basename(path), hash_file(path)) for path in _files(recipe)]
    except OSError as error:
        raise BadInput(f"{recipe.field}.path: {recipe.source.path} cannot be read ({error}); mend that") from error
    return _digest([files, *settings])


def _files(recipe: Recipe) -> Sequence[str]:
    return [file.path for file in list_chat_files(recipe.source, recipe.field)[0]]


def _settings(recipe: Recipe) -> Iterator[Any]:
    """Yield everything but the rows on which samples depend."""
    chats, source = recipe.chats, recipe.source
    if isinstance(chats, ComparisonsSection):
        rules = ["labels" if chats.is_single else chats.rows, chats.bad_rows]
    else:
        rules = [chats.train_on, chats.bad_rows, chats.too_long]
    yield [_FORMAT, recipe.seq_len, *rules, dict(source.columns), dict(source.roles)]
    tokenizer = load_tokenizer(recipe.tokenizer)
    yield tokenizer.vocabulary_hash
    yield hashlib.sha256(tokenizer.backend.to_str().encode()).hexdigest()
    yield load_template(chats.template, recipe.tokenizer, f"{recipe.section}.template").fingerprint


def _digest(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@contextmanager
def _held(recipe: Recipe, key: str) -> Iterator[None]:
    """Hold a key of the cache: another run that wants the same waits."""
    with _writing(recipe):
        stream = open(Path(recipe.chats.cache, f".{key}.lock"), "w")  # noqa: SIM115
    with stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@contextmanager
def _writing(recipe: Recipe) -> Iterator[None]:
    """Say in one sentence that the cache cannot be written to."""
    try:
        yield
    except OSError as error:
        place = f"{recipe.section}.cache: {recipe.chats.cache}"
        raise BadInput(f"{place} cannot be written to ({error}); choose another path") from error


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
