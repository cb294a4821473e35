"""Tokenize documents into a Megatron dataset: PREFIX.bin, PREFIX.idx and PREFIX.meta.json.

    python tools/preprocess_data.py FILE_OR_DIRECTORY... --tokenizer DIR --out PREFIX [--bos] [--eod TOKEN] [--verify]

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

if not __package__:  # run as a script: the packages are beside tools/, which Python puts first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.errors import BadInput
from tools.console import Progress, end_process, run_command
from tools.outputs import check_prefix
from tools.paths import path_text

if TYPE_CHECKING:
    from trainer.data.dataset_files import DatasetMeta
    from trainer.data.making.documents import InputFile
    from trainer.data.making.parts import Part, PartStore
    from trainer.data.making.workers import DocumentWorkers, Recipe
    from trainer.data.tokenizer import Tokenizer

BLOCK_BYTES = 1 << 20
PART_SECONDS = 20.0  # the most work a kill can lose
SAMPLE_EVERY = 50  # documents; --verify tokenizes the first and every 50th of each block again


def preprocess(
    files: Sequence[InputFile],
    recipe: Recipe,
    prefix: str,
    *,
    num_workers: int = 1,
    block_bytes: int = BLOCK_BYTES,
    part_seconds: float = PART_SECONDS,
) -> DatasetMeta:
    """Make `files` into `<prefix>.bin/.idx/.meta.json`; the same bytes for any number of workers or interruptions.

    Returns at once when exactly that dataset is there already. Raises BadInput, also when another one is.
    """
    from trainer.data.dataset_files import read_meta
    from trainer.data.indexed import check_files
    from trainer.data.making.around_documents import find_notes
    from trainer.data.making.parts import PartStore
    from trainer.data.making.workers import DocumentWorkers, token_dtype

    tokenizer = recipe.load_tokenizer()
    for note in find_notes(recipe, tokenizer):
        print(f"note: {note}", file=sys.stderr)
    # a worker more than there are blocks would load its tokenizer for nothing
    num_blocks = -(-sum(file.num_bytes for file in files) // block_bytes)
    with DocumentWorkers(recipe, tokenizer, min(num_workers, max(1, num_blocks))) as workers:
        sources = _describe_sources(files, workers)
        fingerprint = _fingerprint(sources, tokenizer, recipe, block_bytes, _hash_tokenizer(tokenizer))
        meta = read_meta(prefix)
        if meta:
            # what earlier versions hashed of the tokenizer: whole, but half a second's work for a large one
            whole = hashlib.sha256(tokenizer.backend.to_str().encode()).hexdigest()
            if meta.fingerprint not in (fingerprint, _fingerprint(sources, tokenizer, recipe, block_bytes, whole)):
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
            _tokenize(files, store, workers, recipe.text_key, block_bytes, part_seconds)
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


def _hash_tokenizer(tokenizer: Tokenizer) -> str:
    """Compute the SHA-256 of all that makes its tokens: `tokenizer.json`, or what was converted to one."""
    from trainer.data.making.parts import hash_file

    file = Path(tokenizer.directory) / "tokenizer.json"
    return hash_file(file) if file.is_file() else hashlib.sha256(tokenizer.backend.to_str().encode()).hexdigest()


def _fingerprint(
    sources: list[dict[str, str | int]], tokenizer: Tokenizer, recipe: Recipe, block_bytes: int, tokenizer_hash: str
) -> str:
    """Hash everything the bytes of the dataset, and the cutting into blocks, follow from."""
    settings: dict[str, object] = {
        "sources": [[source["kind"], source["num_bytes"], source["sha256"]] for source in sources],
        "tokenizer": tokenizer_hash,
        "eod_id": tokenizer.eod_id,
        "text_key": recipe.text_key,
        "block_bytes": block_bytes,
    }
    # Only where they are used, so that what was made before they existed is still known as the same.
    if tokenizer.bos_id is not None:
        settings["bos_id"] = tokenizer.bos_id
    if recipe.skip_missing:
        settings["skip_missing"] = True
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
    from trainer.data.dataset_files import DatasetMeta
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
        eod_token=tokenizer.eod_token,
        bos_id=tokenizer.bos_id,
        num_missing_documents=total.num_missing,
    )
    os.replace(data, prefix + ".bin")
    os.replace(index, prefix + ".idx")
    meta.write(Path(prefix + ".meta.json"))
    store.remove()
    return meta


def _summary(meta: DatasetMeta) -> str:
    left_out = [f"{meta.num_empty_documents} empty ones left out"] if meta.num_empty_documents else []
    if meta.num_missing_documents:
        left_out.append(f"{meta.num_missing_documents} records without text left out")
    beside = f" ({', '.join(left_out)})" if left_out else ""
    return f"{meta.num_documents:,} documents{beside}, {meta.num_tokens:,} tokens, {meta.dtype}"


def verify(files: Sequence[InputFile], recipe: Recipe, prefix: str, *, num_workers: int = 1) -> None:
    """Check a finished dataset against its inputs: hashes, counts, and a sample of documents tokenized again."""
    from trainer.data.indexed import TokenDataset, check_tokenizer
    from trainer.data.making.documents import iter_blocks
    from trainer.data.making.parts import hash_file
    from trainer.data.making.workers import DocumentWorkers

    tokenizer = recipe.load_tokenizer()
    dataset = TokenDataset(prefix)
    if dataset.meta is None:
        raise BadInput(f"{prefix}.meta.json: no such file; make the dataset again without --verify")
    check_tokenizer(dataset, tokenizer)
    for suffix, expected in ((".bin", dataset.meta.bin_sha256), (".idx", dataset.meta.idx_sha256)):
        if hash_file(prefix + suffix) != expected:
            raise BadInput(f"{prefix + suffix}: not the SHA-256 of {prefix}.meta.json; delete both and make them again")
    num_documents = num_sampled = num_same_text = 0
    with (
        DocumentWorkers(recipe, tokenizer, num_workers) as workers,
        Progress("verifying", dataset.num_documents) as progress,
    ):
        for _, sample in workers.sample(iter_blocks(files, recipe.text_key), SAMPLE_EVERY):
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
    arguments = _parse(argv)

    def command() -> None:
        from trainer.data.making.documents import describe_left_out, list_inputs
        from trainer.data.making.workers import Recipe

        if arguments.workers < 1:
            raise BadInput(f"--workers: {arguments.workers} is not a number of processes; a value that would work: 1")
        check_prefix(arguments.out)
        files, left_out = list_inputs(arguments.inputs)
        if left_out:
            print(f"left out (a file that is named is read all the same): {describe_left_out(left_out)}")
        recipe = Recipe(arguments.tokenizer, arguments.text_key, arguments.skip_missing, arguments.eod, arguments.bos)
        preprocess(files, recipe, arguments.out, num_workers=arguments.workers)
        if arguments.verify:
            verify(files, recipe, arguments.out, num_workers=arguments.workers)

    return run_command(command)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Tokenize documents into a Megatron dataset.")
    parser.add_argument(
        "inputs",
        type=path_text,
        nargs="+",
        metavar="INPUT",
        help="JSONL, JSON arrays, Parquet, Arrow, text (one document a file), .zst or .gz, directories",
    )
    parser.add_argument(
        "--tokenizer", type=path_text, required=True, metavar="DIR", help="Hugging Face tokenizer directory"
    )
    parser.add_argument(
        "--out", type=path_text, required=True, metavar="PREFIX", help="path of the dataset without suffix"
    )
    parser.add_argument(
        "--text-key", default="text", help="key or column of the text in JSON, Parquet and Arrow (default: text)"
    )
    parser.add_argument(
        "--skip-missing",
        action="store_true",
        help="leave out, and count, records without text: null, no such key, bytes that are not UTF-8",
    )
    parser.add_argument("--bos", action="store_true", help="begin every document with the tokenizer's BOS token")
    parser.add_argument(
        "--eod", metavar="TOKEN", help="special token that ends every document (default: the tokenizer's eos token)"
    )
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="processes (default: all cores)"
    )
    parser.add_argument(
        "--verify", action="store_true", help="afterwards check hashes, counts and a sample of documents"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    end_process(main)
