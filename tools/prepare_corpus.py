"""Make the embedded default corpus from text that is on every machine: the sources of Python's standard library.

    python tools/prepare_corpus.py --out data/stdlib

Writes DIR/tokenizer, DIR/train.{bin,idx,meta.json} and DIR/validation.{bin,idx,meta.json}; needs no network.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a script: the packages are beside tools/, which Python puts first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.errors import BadInput
from tools.console import end_process, run_command
from tools.outputs import check_directory
from tools.paths import path_text
from tools.preprocess_data import preprocess
from tools.train_tokenizer import check_vocab_size, train_tokenizer

if TYPE_CHECKING:
    from trainer.data.making.documents import InputFile

VALIDATION_SHARE = 50  # one file in this many is held out
_FORMAT = 2  # raise it when the same settings give other files
_OLD_FORMATS = (1,)  # served as they are: 1 has no chat tokens
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
"""Of ChatML, in the tokenizer from the start, so that what is pretrained can be fine-tuned on conversations."""
_MARKER = "corpus.json"


def prepare_corpus(out: str, vocab_size: int, library: Path | None = None) -> bool:
    """Make the corpus in `out`; False when it was complete already. Raises BadInput when another one is there.

    `library` is the directory of `.py` files to read, the running Python's standard library by default.
    """
    from trainer.data.making.workers import Recipe

    check_vocab_size(vocab_size, len(CHAT_TOKENS))
    directory = Path(out)
    settings = {"format": _FORMAT, "vocab_size": vocab_size}
    if _is_complete(directory, settings):
        return False
    train, validation, num_skipped = split_library(library or Path(sysconfig.get_path("stdlib")))
    num_bytes = sum(file.num_bytes for file in train)
    print(
        f"{len(train)} files ({num_bytes / 1e6:.1f} MB) of Python {platform.python_version()}'s library to train on, "
        f"{len(validation)} held out, {num_skipped} not UTF-8 left out"
    )
    tokenizer = directory / "tokenizer"
    _write_marker(directory, settings, is_complete=False)
    if not tokenizer.exists():
        size = train_tokenizer(train, str(tokenizer), vocab_size, special_tokens=CHAT_TOKENS)
        print(f"{tokenizer}: {size} tokens")
    num_workers = len(os.sched_getaffinity(0))
    for name, files in (("train", train), ("validation", validation)):
        preprocess(files, Recipe(str(tokenizer)), str(directory / name), num_workers=num_workers)
    _write_marker(directory, settings, is_complete=True)
    return True


def _is_complete(directory: Path, settings: dict[str, int]) -> bool:
    """Return whether the corpus is there; raise BadInput if what is there, whole or not, is another one."""
    marker, tokenizer, advice = directory / _MARKER, directory / "tokenizer", "delete it or choose another"
    if not marker.is_file():
        if tokenizer.exists():
            raise BadInput(f"--out {directory}: {tokenizer} is there, and nothing says what made it; {advice}")
        return False
    try:
        found = json.loads(marker.read_text(encoding="utf-8"))
        _ = found["settings"], found["python"]
    except (ValueError, KeyError, TypeError):
        raise BadInput(f"--out {directory}: {marker} is damaged; {advice}") from None
    is_complete = found.get("is_complete", True)  # earlier versions wrote it at the end alone
    formats = (_FORMAT, *_OLD_FORMATS) if is_complete else (_FORMAT,)
    if found["settings"] not in [settings | {"format": one} for one in formats]:
        raise BadInput(f"--out {directory}: a corpus with {found['settings']} is there; {advice}")
    if is_complete:
        return True
    if found["python"] != platform.python_version():
        raise BadInput(f"--out {directory}: a corpus begun with Python {found['python']} is there; {advice}")
    return False


def _write_marker(directory: Path, settings: dict[str, int], *, is_complete: bool) -> None:
    """Say what the directory is made with: before the first file that depends on it, and when all is there."""
    content = {"settings": settings, "python": platform.python_version(), "is_complete": is_complete}
    directory.mkdir(parents=True, exist_ok=True)
    temporary = (directory / _MARKER).with_suffix(".tmp")
    temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
    os.replace(temporary, directory / _MARKER)


def split_library(library: Path) -> tuple[list[InputFile], list[InputFile], int]:
    """Find the `.py` files of `library`, sorted by path, and hold some out by a hash of the path.

    Returns training files, validation files and how many were not UTF-8. Installed packages are no part of it.
    """
    from trainer.data.making.documents import InputFile

    train: list[InputFile] = []
    validation: list[InputFile] = []
    num_skipped = 0
    for file in sorted(library.rglob("*.py"), key=lambda file: file.relative_to(library).parts):
        name = file.relative_to(library)
        if {"site-packages", "dist-packages"} & set(name.parts) or not file.is_file():
            continue
        try:
            file.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            num_skipped += 1
            continue
        held_out = hashlib.sha256(name.as_posix().encode()).digest()[0] * VALIDATION_SHARE < 256
        (validation if held_out else train).append(InputFile(str(file), "text", keeps_bom=True))
    if not train or not validation:
        raise BadInput(f"{library}: too few .py files for a corpus; install Python with its standard library's sources")
    return train, validation, num_skipped


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    parser = argparse.ArgumentParser(description="Make the default corpus from the running Python's standard library.")
    parser.add_argument("--out", type=path_text, required=True, metavar="DIR", help="directory of the corpus")
    parser.add_argument(
        "--vocab-size", type=int, default=4096, metavar="N", help="tokens of its tokenizer (default: 4096)"
    )
    arguments = parser.parse_args(argv)

    def command() -> None:
        check_directory(arguments.out, "data/stdlib")
        made = prepare_corpus(arguments.out, arguments.vocab_size)
        print(f"{arguments.out}: {'complete' if made else 'already complete'}")

    return run_command(command)


if __name__ == "__main__":
    end_process(main)
