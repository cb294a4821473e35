"""Make training documents in which a passkey is hidden and asked for, of many lengths, in the text of a dataset.

Run: python tools/make_passkeys.py data/stdlib/train --tokenizer data/stdlib/tokenizer --out data/passkeys
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: the packages are beside tools/, which Python puts first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.errors import BadInput
from tools.console import Progress, end_process, run_command
from tools.outputs import check_prefix
from tools.paths import path_text


def make_passkeys(text: str, tokenizer_directory: str, out: str, arguments: argparse.Namespace) -> None:
    """Write a dataset at `out`: documents of up to `arguments.longest` tokens, `arguments.tokens` in all.

    An octave of lengths has half the tokens of the one below it: finding the key is learnt on short texts, many to a
    sample, and stretched by the long ones. The key lies at any depth. Raises BadInput.
    """
    import numpy as np

    from trainer.data.dataset_files import DatasetMeta
    from trainer.data.indexed import TokenDataset, check_tokenizer
    from trainer.data.making.parts import hash_file, write_dataset
    from trainer.data.making.workers import token_dtype
    from trainer.data.tokenizer import load_tokenizer
    from trainer.evaluate.passkey import PasskeyMaker

    tokenizer, dataset = load_tokenizer(tokenizer_directory), TokenDataset(text)
    check_tokenizer(dataset, tokenizer)
    maker, random = PasskeyMaker(tokenizer, dataset, arguments.digits), np.random.default_rng(arguments.seed)
    if arguments.longest <= maker.shortest:
        raise BadInput(
            f"--longest: {arguments.longest} tokens have no room for a passkey; at least {maker.shortest + 1}"
        )
    documents, num_tokens = [], 0
    with Progress("passkeys", arguments.tokens) as progress:
        while num_tokens < arguments.tokens:
            # a density of 1 / length ** 3
            length = int(random.uniform(arguments.longest**-2.0, maker.shortest**-2.0) ** -0.5)
            document = maker.make(length - 2, random.random(), random).tokens
            documents.append(np.append(document, tokenizer.eod_id))
            num_tokens += len(documents[-1])
            progress.show(num_tokens)
    lengths = np.array([len(document) for document in documents], dtype=np.int32)
    dtype = token_dtype(tokenizer.vocab_size)
    write_dataset(Path(out), np.concatenate(documents).astype(dtype), lengths)
    DatasetMeta(
        vocabulary_hash=tokenizer.vocabulary_hash,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        dtype=np.dtype(dtype).name,
        num_documents=len(documents),
        num_tokens=num_tokens,
        num_empty_documents=0,
        fingerprint=f"passkeys/{arguments.digits}/{arguments.longest}/{arguments.tokens}/{arguments.seed}",
        bin_sha256=hash_file(Path(f"{out}.bin")),
        idx_sha256=hash_file(Path(f"{out}.idx")),
        eod_token=tokenizer.eod_token,
        bos_id=tokenizer.bos_id,
    ).write(Path(f"{out}.meta.json"))
    print(f"{out}: {len(documents):,} documents, {num_tokens:,} tokens")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    parser = argparse.ArgumentParser(prog="make_passkeys.py", description="Documents with passkeys, to train on.")
    parser.add_argument("text", type=path_text, metavar="PREFIX", help="dataset whose text is around the keys")
    parser.add_argument("--tokenizer", type=path_text, required=True, metavar="DIR", help="tokenizer of the dataset")
    parser.add_argument("--out", type=path_text, required=True, metavar="PREFIX", help="dataset to write")
    for name, default, meaning in (
        ("longest", 2048, "tokens of the longest document"),
        ("tokens", 2_000_000, "tokens in all"),
        ("digits", 5, "digits of a key"),
        ("seed", 0, "of keys, depths and lengths"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{meaning} (default: {default})")
    arguments = parser.parse_args(argv)
    if arguments.tokens < 1 or arguments.seed < 0:
        parser.error("--tokens and --seed: must be above and at least 0; values that would work: 2000000 and 0")

    def command() -> None:
        check_prefix(arguments.out)
        make_passkeys(arguments.text, arguments.tokenizer, arguments.out, arguments)

    return run_command(command, "stopped; start it again")


if __name__ == "__main__":
    end_process(main)
