"""Tokenize documents into a Megatron dataset: PREFIX.bin, PREFIX.idx and PREFIX.meta.json.

    python tools/preprocess_data.py FILE_OR_DIRECTORY... --tokenizer DIR --out PREFIX [--workers N] [--verify]

An interrupted run goes on where it stopped when the same command is given again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from configs.errors import BadInput
from tools.console import Progress, run_command
from tools.paths import path_text

if TYPE_CHECKING:
    from trainer.data.indexed import DatasetMeta
    from trainer.data.making.documents import InputFile
    from trainer.data.making.parts import Part, PartStore
    from trainer.data.making.workers import DocumentWorkers
    from trainer.data.tokenizer import Tokenizer

BLOCK_BYTES = 1 << 20
PART_SECONDS = 20.0  # the most work a kill can lose
SAMPLE_EVERY = 50  # documents; --verify tokenizes the first and every 50th of each block again


def preprocess(
    files: Sequence[InputFile],
    tokenizer_directory: str,
    prefix: str,
    *,
    text_key: str = "text",
    num_workers: int = 1,
    block_bytes: int = BLOCK_BYTES,
    part_seconds: float = PART_SECONDS,
) -> DatasetMeta:
    """Tokenize `files` into `<prefix>.bin/.idx/.meta.json`; the same bytes for any number of workers or interruptions.

    Returns at once when exactly that dataset is there already. Raises BadInput, also when another one is.
    """
    from trainer.data.indexed import check_files, read_meta
    from trainer.data.making.parts import PartStore
    from trainer.data.making.workers import DocumentWorkers, token_dtype
    from trainer.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_directory)
    with DocumentWorkers(tokenizer_directory, text_key, num_workers) as workers:
        sources = _describe_sources(files, workers)
        fingerprint = _fingerprint(sources, tokenizer, text_key, block_bytes)
        meta = read_meta(prefix)
        if meta:
            if meta.fingerprint != fingerprint:
                raise BadInput(
                    f"--out {prefix}: other inputs or settings made the one there; choose another or delete it"
                )
            check_files(prefix)
            print(f"{prefix}: already complete, {_summary(meta)}")
            return meta
        directory = Path(prefix + ".parts")
        _refuse_strangers(prefix, directory)
        store = PartStore(directory, fingerprint, token_dtype(tokenizer.vocab_size))
        try:
            _tokenize(files, store, workers, text_key, block_bytes, part_seconds)
        except KeyboardInterrupt:
            store.finish_part()
            store.give_up()
            raise
        except BaseException:
            store.give_up()
            raise
    meta = _publish(store, prefix, tokenizer, fingerprint, sources)
    print(f"{prefix}: {_summary(meta)}")
    return meta


def _describe_sources(files: Sequence[InputFile], workers: DocumentWorkers) -> list[dict[str, str | int]]:
    """List the inputs with size and SHA-256: what makes a dataset the same, wherever its inputs lie."""
    hashes = workers.hash_files(list(files))
    return [
        {"path": file.path, "kind": file.kind + file.compression, "num_bytes": file.num_bytes, "sha256": value}
        for file, value in zip(files, hashes, strict=True)
    ]


def _fingerprint(sources: list[dict[str, str | int]], tokenizer: Tokenizer, text_key: str, block_bytes: int) -> str:
    """Hash everything the bytes of the dataset, and the cutting into blocks, follow from."""
    settings = {
        "sources": [[source["kind"], source["num_bytes"], source["sha256"]] for source in sources],
        "tokenizer": hashlib.sha256(tokenizer.backend.to_str().encode()).hexdigest(),
        "eod_id": tokenizer.eod_id,
        "text_key": text_key,
        "block_bytes": block_bytes,
    }
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def _refuse_strangers(prefix: str, parts: Path) -> None:
    """Refuse to write over files that no run of this command left."""
    for suffix in (".bin", ".idx"):
        if os.path.exists(prefix + suffix) and not (parts / "manifest.json").is_file():
            raise BadInput(f"--out {prefix}: {prefix + suffix} is there, not made here; choose another or delete it")


def _tokenize(
    files: Sequence[InputFile],
    store: PartStore,
    workers: DocumentWorkers,
    text_key: str,
    block_bytes: int,
    part_seconds: float,
) -> None:
    """Tokenize the blocks no finished part holds yet, closing a part every `part_seconds`."""
    from trainer.data.making.documents import iter_blocks
    from trainer.data.making.parts import Part

    blocks = iter_blocks(files, text_key, block_bytes)
    done = store.total
    num_disk_bytes = sum(block.num_disk_bytes for block in islice(blocks, done.num_blocks))
    if done.num_blocks:
        print(f"going on after {done.num_documents} documents of an interrupted run")
    total, fresh = sum(file.num_bytes for file in files), Part()
    started = part_started = time.monotonic()
    with Progress("tokenizing", total) as progress:
        for block, tokenized in workers.tokenize(blocks):
            fresh = fresh.plus(store.append(tokenized))
            num_disk_bytes += block.num_disk_bytes
            progress.show(num_disk_bytes, _rates(fresh, time.monotonic() - started))
            if time.monotonic() - part_started >= part_seconds:
                store.finish_part()
                part_started = time.monotonic()
        store.finish_part()
    if fresh.num_blocks:
        print(f"tokenized {fresh.num_documents} documents, {_rates(fresh, time.monotonic() - started)}")


def _rates(part: Part, seconds: float) -> str:
    seconds = max(seconds, 1e-9)
    return (
        f"{part.num_documents / seconds:,.0f} documents/s, {part.num_text_bytes / 1e6 / seconds:.1f} MB/s, "
        f"{part.num_tokens / seconds / 1e6:.2f} M tokens/s"
    )


def _publish(
    store: PartStore, prefix: str, tokenizer: Tokenizer, fingerprint: str, sources: list[dict[str, str | int]]
) -> DatasetMeta:
    """Merge the parts and rename the result into place: `.meta.json` comes last and says that all is there."""
    from trainer.data.indexed import DatasetMeta
    from trainer.data.making.parts import hash_file

    total = store.total
    if not total.num_documents:
        store.remove()
        raise BadInput(f"--out {prefix}: the inputs hold no text at all; give files with text")
    data, index = store.directory / "merged.bin", store.directory / "merged.idx"
    with Progress("merging parts", total.num_documents) as progress:
        store.merge(data, index, progress.show)
    meta = DatasetMeta(
        vocabulary_hash=tokenizer.vocabulary_hash,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        dtype=store.dtype.__name__,
        num_documents=total.num_documents,
        num_tokens=total.num_tokens,
        num_empty_documents=total.num_empty,
        fingerprint=fingerprint,
        bin_sha256=hash_file(data),
        idx_sha256=hash_file(index),
        sources=sources,
    )
    os.replace(data, prefix + ".bin")
    os.replace(index, prefix + ".idx")
    meta.write(Path(prefix + ".meta.json"))
    store.remove()
    return meta


def _summary(meta: DatasetMeta) -> str:
    empty = f" ({meta.num_empty_documents} empty ones left out)" if meta.num_empty_documents else ""
    return f"{meta.num_documents:,} documents{empty}, {meta.num_tokens:,} tokens, {meta.dtype}"


def verify(
    files: Sequence[InputFile], tokenizer_directory: str, prefix: str, *, text_key: str = "text", num_workers: int = 1
) -> None:
    """Check a finished dataset against its inputs: hashes, counts, and a sample of documents tokenized again."""
    from trainer.data.indexed import TokenDataset, check_tokenizer
    from trainer.data.making.documents import iter_blocks
    from trainer.data.making.parts import hash_file
    from trainer.data.making.workers import DocumentWorkers
    from trainer.data.tokenizer import load_tokenizer

    dataset = TokenDataset(prefix)
    if dataset.meta is None:
        raise BadInput(f"{prefix}.meta.json: no such file; make the dataset again without --verify")
    check_tokenizer(dataset, load_tokenizer(tokenizer_directory))
    for suffix, expected in ((".bin", dataset.meta.bin_sha256), (".idx", dataset.meta.idx_sha256)):
        if hash_file(prefix + suffix) != expected:
            raise BadInput(f"{prefix + suffix}: not the SHA-256 of {prefix}.meta.json; delete both and make them again")
    num_documents = num_sampled = num_same_text = 0
    with (
        DocumentWorkers(tokenizer_directory, text_key, num_workers) as workers,
        Progress("verifying", dataset.num_documents) as progress,
    ):
        for _, sample in workers.sample(iter_blocks(files, text_key), SAMPLE_EVERY):
            for place, tokens, same_text in sample.tokens:
                document = num_documents + place
                length = int(dataset.lengths[document]) if document < dataset.num_documents else 0
                if length != tokens.size or (dataset.read(document, 0, length) != tokens).any():
                    raise BadInput(f"{prefix}: document {document} is not what its input gives; make it again")
                num_same_text += same_text
            num_sampled += len(sample.tokens)
            num_documents += sample.num_documents
            progress.show(num_documents)
    if num_documents != dataset.num_documents:
        raise BadInput(f"{prefix}: {dataset.num_documents} documents, the inputs hold {num_documents}; make it again")
    print(
        f"{prefix}: verified hashes, {num_documents:,} documents, {num_sampled:,} of them tokenized again; "
        f"{num_same_text:,} of those decode to exactly their text"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    parser = argparse.ArgumentParser(description="Tokenize documents into a Megatron dataset.")
    parser.add_argument(
        "inputs",
        type=path_text,
        nargs="+",
        metavar="INPUT",
        help="JSONL, Parquet, text (one document a file), .zst or .gz of them, directories",
    )
    parser.add_argument(
        "--tokenizer", type=path_text, required=True, metavar="DIR", help="Hugging Face tokenizer directory"
    )
    parser.add_argument(
        "--out", type=path_text, required=True, metavar="PREFIX", help="path of the dataset without suffix"
    )
    parser.add_argument(
        "--text-key", default="text", help="key or column of the text in JSONL and Parquet (default: text)"
    )
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="processes (default: all cores)"
    )
    parser.add_argument(
        "--verify", action="store_true", help="afterwards check hashes, counts and a sample of documents"
    )
    arguments = parser.parse_args(argv)

    def command() -> None:
        from trainer.data.making.documents import list_inputs

        if arguments.workers < 1:
            raise BadInput(f"--workers: {arguments.workers} is not a number of processes; a value that would work: 1")
        files, left_out = list_inputs(arguments.inputs)
        if left_out:
            print(f"left out, not known as text: {', '.join(f'{n} {s}' for s, n in left_out.most_common())}")
        options = {"text_key": arguments.text_key, "num_workers": arguments.workers}
        preprocess(files, arguments.tokenizer, arguments.out, **options)
        if arguments.verify:
            verify(files, arguments.tokenizer, arguments.out, **options)

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
