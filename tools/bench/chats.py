"""Chats for the benchmarks of fine-tuning, of text that is on every machine: docstrings of Python's standard library.

Torch-free. Also a tokenizer with ChatML's tokens, and ChatML as a template with generation tags.
"""

from __future__ import annotations

import ast
import json
import sysconfig
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from tools.prepare_corpus import CHAT_TOKENS, split_library
from tools.train_tokenizer import train_tokenizer

TAGGED_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML as TRL needs it to find the mask."""
_LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "encodings"}


def write_chats(path: Path, num_bytes: int = 0) -> None:
    """Write chats as JSON Lines of OpenAI's form; all there are, then again until the file has `num_bytes`."""
    lines = [json.dumps({"messages": chat}) + "\n" for chat in _chats(Path(sysconfig.get_path("stdlib")))]
    with path.open("w", encoding="utf-8") as file:
        file.writelines(lines)
        while file.tell() < num_bytes:
            file.writelines(lines)


def write_pairs(path: Path, num_pairs: int, length: int | None = None) -> None:
    """Write pairs as JSON Lines of TRL's form: a question, its answer as chosen, and that of the next one.

    With a `length` only answers that have so many characters are taken, of which the rest is cut.
    """
    chats = [chat for chat in _chats(Path(sysconfig.get_path("stdlib"))) if len(chat[-1]["content"]) >= (length or 0)]
    rows = []
    for (prompt, answer), (_, other) in pairwise(chats[: num_pairs + 1]):
        chosen, rejected = ([{**one, "content": one["content"][:length].strip()}] for one in (answer, other))
        if chosen != rejected:
            rows.append({"prompt": [prompt], "chosen": chosen, "rejected": rejected})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_tokenizer(chats: Path, out: Path, vocab_size: int) -> None:
    """Train a byte-level BPE tokenizer on chats, with ChatML's tokens."""
    from trainer.data.making.documents import InputFile

    text = out.with_suffix(".txt")
    rows = map(json.loads, chats.read_text(encoding="utf-8").splitlines())
    text.write_text("\n".join(turn["content"] for row in rows for turn in row["messages"]), encoding="utf-8")
    train_tokenizer([InputFile(str(text), "text")], str(out), vocab_size, special_tokens=CHAT_TOKENS)


def _chats(library: Path) -> Iterator[list[dict[str, str]]]:
    files = [file for part in split_library(library)[:2] for file in part]
    for file in sorted(files, key=lambda file: file.path):
        name = Path(file.path).relative_to(library)
        if _LEFT_OUT.isdisjoint(name.parts):
            for node in ast.walk(ast.parse(Path(file.path).read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    answer = ast.get_docstring(node)
                    if answer and answer.strip():
                        module = ".".join(name.with_suffix("").parts)
                        yield [
                            {"role": "user", "content": f"What is {node.name} in Python's module {module}?"},
                            {"role": "assistant", "content": answer},
                        ]
