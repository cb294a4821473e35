"""Train a byte-level BPE tokenizer and write it as a Hugging Face directory.

python tools/train_tokenizer.py FILE_OR_DIRECTORY... --out DIR --vocab-size 32000 [--special-token "<|im_start|>" ...]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a script: the packages are beside tools/, which Python puts first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.errors import BadInput
from tools.console import Progress, end_process, run_command
from tools.outputs import check_directory, whole_directory
from tools.paths import path_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from trainer.data.making.documents import InputFile

MIN_VOCAB_SIZE = 257  # 256 bytes and the end-of-document token


def train_tokenizer(
    files: Sequence[InputFile],
    out: str,
    vocab_size: int,
    text_key: str = "text",
    *,
    skip_missing: bool = False,
    special_tokens: Sequence[str] = (),
) -> int:
    """Train on the documents of `files` and write the directory `out`; return the size of the vocabulary.

    Byte-level BPE with GPT-2's pre-tokenization (Radford et al. 2019): any text survives encode and decode unchanged.
    With `skip_missing` records without text are left out. `special_tokens` are tokens of the vocabulary beside the end
    of a document that no text gives, such as those of a chat template. Raises BadInput when `out` exists or
    `vocab_size` is too small. `out` appears whole or not at all.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from trainer.data.tokenizer import END_OF_DOCUMENT

    check_vocab_size(vocab_size, len(special_tokens))
    if os.path.exists(out):
        raise BadInput(f"--out {out}: it exists already; delete it or choose another directory")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(dict.fromkeys([END_OF_DOCUMENT, *special_tokens])),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    with Progress("reading text", sum(file.num_bytes for file in files)) as progress:
        tokenizer.train_from_iterator(_texts(files, text_key, skip_missing, progress), trainer)
    _write(tokenizer, Path(out), END_OF_DOCUMENT)
    return tokenizer.get_vocab_size()


def check_vocab_size(vocab_size: int, num_special_tokens: int = 0) -> None:
    """Raise BadInput for a vocabulary that cannot hold every byte, the end of a document and further special tokens."""
    if vocab_size < MIN_VOCAB_SIZE + num_special_tokens:
        more = f" and {num_special_tokens} special tokens" if num_special_tokens else ""
        raise BadInput(
            f"--vocab-size: {vocab_size} is less than 256 bytes and one end-of-document token{more}; try 4096"
        )


def _texts(files: Sequence[InputFile], text_key: str, skip_missing: bool, progress: Progress) -> Iterator[str]:
    from trainer.data.making.documents import iter_blocks, texts_of

    num_read = num_missing = 0
    for block in iter_blocks(files, text_key):
        for text in texts_of(block, text_key, skip_missing=skip_missing):
            if text is None:
                num_missing += 1
            else:
                yield text
        num_read += block.num_disk_bytes
        progress.show(num_read, f"{num_read / 1e6:.0f} MB")
    if num_missing:
        print(f"left out {num_missing} records without text")


def _write(tokenizer: Tokenizer, out: Path, end_of_document: str) -> None:
    """Write the files Hugging Face reads, in a directory renamed into place when it is complete."""
    with whole_directory(out) as temporary:
        tokenizer.save(str(temporary / "tokenizer.json"))
        special = {"bos_token": end_of_document, "eos_token": end_of_document}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **special,
            "clean_up_tokenization_spaces": False,
            "model_max_length": int(1e30),  # Hugging Face's way of saying that the tokenizer sets no limit
        }
        for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", special)):
            (temporary / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    parser = argparse.ArgumentParser(
        description="Train a byte-level BPE tokenizer and write it as a Hugging Face directory."
    )
    parser.add_argument(
        "inputs",
        type=path_text,
        nargs="+",
        metavar="FILE",
        help="JSONL, JSON arrays, Parquet, Arrow, text, also .zst or .gz; directories",
    )
    parser.add_argument("--out", type=path_text, required=True, metavar="DIR", help="directory to create")
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N", help="tokens, the special one included")
    parser.add_argument(
        "--text-key", default="text", help="key or column of the text in JSON, Parquet and Arrow (default: text)"
    )
    parser.add_argument(
        "--special-token",
        action="append",
        default=[],
        metavar="TOKEN",
        help='token of its own that no text gives, as chat templates have: "<|im_start|>", "<|im_end|>"',
    )
    parser.add_argument(
        "--skip-missing",
        action="store_true",
        help="leave out, and count, records without text: null, no such key, bytes that are not UTF-8",
    )
    arguments = parser.parse_args(argv)

    def command() -> None:
        from trainer.data.making.documents import describe_left_out, list_inputs

        check_directory(arguments.out, "data/tokenizer")
        files, left_out = list_inputs(arguments.inputs)
        if left_out:
            print(f"left out (a file that is named is read all the same): {describe_left_out(left_out)}")
        size = train_tokenizer(
            files,
            arguments.out,
            arguments.vocab_size,
            arguments.text_key,
            skip_missing=arguments.skip_missing,
            special_tokens=arguments.special_token,
        )
        short = "" if size == arguments.vocab_size else f" (all the text gives; {arguments.vocab_size} asked for)"
        print(f"{arguments.out}: {size} tokens{short}")

    return run_command(command)


if __name__ == "__main__":
    end_process(main)
