"""Make training documents in which a pass key is hidden and asked for, of many lengths, around text of a dataset.

Run: python tools/make_passkeys.py data/stdlib/train --tokenizer data/stdlib/tokenizer --out data/passkeys --longest 2048
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tools.console import end_process, run_command
from tools.paths import path_text


def make_passkeys(filler: str, tokenizer_dir: str, out: str, *, longest: int, num_tokens: int, seed: int) -> int:
    """Write `<out>.bin`, `.idx` and `.meta.json` with about `num_tokens` tokens and return the number of documents.

    Every octave of lengths up to `longest` tokens has the same share of them, the key lies at any depth.
    """
    import numpy as np

    from trainer.data.indexed import TokenDataset, check_tokenizer
    from trainer.data.making.parts import PartStore, TokenizedBlock
    from trainer.data.tokenizer import load_tokenizer
    from trainer.evaluate.passkey import PasskeyMaker

    tokenizer, dataset = load_tokenizer(tokenizer_dir), TokenDataset(filler)
    check_tokenizer(dataset, tokenizer)
    maker, random = PasskeyMaker(tokenizer, dataset), np.random.default_rng(seed)
    least = 64
    documents = []
    while num_tokens > 0:
        # the share of tokens is alike in every octave: lengths with a density of 1 / length ** 2
        length = int(1 / random.uniform(1 / longest, 1 / least))
        document = np.append(maker.make(length - 1, float(random.random()), random).tokens, tokenizer.eod_id)
        documents.append(document)
        num_tokens -= len(document)
    lengths = np.array([len(document) for document in documents], dtype=np.int32)
    tokens = np.concatenate(documents).astype(np.uint16)
    store = PartStore(Path(f"{out}.parts"), "passkeys", np.uint16)
    store.append(TokenizedBlock(tokens.tobytes(), lengths, num_empty=0, num_text_bytes=0))
    store.finish_part()
    store.merge(Path(f"{out}.bin"), Path(f"{out}.idx"), lambda num_written: None)
    store.remove()
    return len(documents)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    parser = argparse.ArgumentParser(description="Documents with pass keys, to train on.")
    parser.add_argument("filler", type=path_text, metavar="PREFIX", help="dataset whose text is around the keys")
    parser.add_argument("--tokenizer", type=path_text, required=True, metavar="DIR")
    parser.add_argument("--out", type=path_text, required=True, metavar="PREFIX")
    parser.add_argument("--longest", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=1000000)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args(argv)
    return run_command(
        lambda: print(make_passkeys(a.filler, a.tokenizer, a.out, longest=a.longest, num_tokens=a.tokens, seed=a.seed))
    )


if __name__ == "__main__":
    end_process(main)
