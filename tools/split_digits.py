"""Write a tokenizer that cuts numbers into single digits, with the vocabulary and ids of the one it is made from.

python tools/split_digits.py TOKENIZER_DIR --out DIR
A model's weights stay good: no id gets another meaning. Numbers then look alike wherever they stand, so that they can
be copied digit by digit, as LLaMA splits them (arXiv:2302.13971, section 2.1).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: the packages are beside tools/, which Python puts first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.errors import BadInput
from tools.console import end_process, run_command
from tools.outputs import check_directory, whole_directory
from tools.paths import path_text

_FILE = "tokenizer.json"
_PROBE = "9876543210"


def split_digits(directory: str, out: str) -> int:
    """Write the tokenizer of `directory` with digits of their own as the directory `out`; return its vocabulary's size.

    Raises BadInput where `out` exists, and where a digit is no token or the tokenizer's class splits words by itself.
    """
    from trainer.data.tokenizer import load_tokenizer

    if os.path.exists(out):
        raise BadInput(f"--out {out}: it exists already; delete it or choose another directory")
    source = Path(load_tokenizer(directory).directory)
    with whole_directory(Path(out)) as temporary:
        for file in source.iterdir():
            if file.is_file() and file.suffix in (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py"):
                shutil.copyfile(file, temporary / file.name)
        if not (temporary / _FILE).is_file():
            raise BadInput(
                f"{source}: has no {_FILE}, which says how words are split; save the tokenizer as a fast one"
            )
        content = json.loads((temporary / _FILE).read_text(encoding="utf-8"))
        content["pre_tokenizer"] = _with_digits(content.get("pre_tokenizer"))
        (temporary / _FILE).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        made = load_tokenizer(temporary)
        if len(made.encode(f"x{_PROBE}")) - len(made.encode("x")) != len(_PROBE):
            raise BadInput(
                f"{directory}: its digits are no tokens, or its class splits words whatever {_FILE} says; a tokenizer "
                "that tools/train_tokenizer.py wrote would work"
            )
    return made.vocab_size


def _with_digits(splitting: dict[str, object] | None) -> dict[str, object]:
    """Return a pre-tokenizer that cuts single digits out, and does with the rest what `splitting` does."""
    steps: list[object] = [{"type": "Digits", "individual_digits": True}]
    if splitting is not None:
        steps.append(splitting)
    return {"type": "Sequence", "pretokenizers": steps}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    parser = argparse.ArgumentParser(prog="split_digits.py", description="A tokenizer that cuts numbers into digits.")
    parser.add_argument("tokenizer", type=path_text, metavar="DIR", help="Hugging Face directory of the tokenizer")
    parser.add_argument("--out", type=path_text, required=True, metavar="DIR", help="directory to create")
    arguments = parser.parse_args(argv)

    def command() -> None:
        check_directory(arguments.out, "data/digits")
        size = split_digits(arguments.tokenizer, arguments.out)
        print(f"{arguments.out}: {size} tokens as before, and a token a digit in numbers")

    return run_command(command)


if __name__ == "__main__":
    end_process(main)
