"""Does `transformers` split text as the tokenizer.json of a model says? Knows no engine, so the answer is quick."""

from __future__ import annotations

from pathlib import Path

_TEXTS = (
    "def f(x):\n    return x\n\n\n",
    "It's 1,234.5 km; naïve café.",
    "a  b\tc 日本語 12345",
    "  HELLO world!!\r\n",
)


def tokenizer_difference(directory: Path) -> str | None:
    """Return a text of which `transformers` makes other tokens than `tokenizer.json` says; None if all are the same.

    For some model types it builds the splitting of words itself, whatever the file says, and training reads the file.
    """
    if not (directory / "tokenizer.json").is_file():
        return None
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    ours = Tokenizer.from_file(str(directory / "tokenizer.json"))
    try:
        theirs = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except ValueError:
        return None  # it is loaded with code of its own, which is not run here
    for text in _TEXTS:
        if ours.encode(text, add_special_tokens=False).ids != theirs.encode(text, add_special_tokens=False):
            return text
    return None
