"""Paths on the command lines of tools: cleaned as those of configs are, for `type=` of an argument. Torch-free."""

from __future__ import annotations

import argparse
from pathlib import Path

from configs.paths import clean_path


def path_text(text: str) -> str:
    """Return a typed path with `~` expanded; argparse tells in words what can be none."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; a value that would work: a path such as data/corpus")
    try:
        return clean_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def path_argument(text: str) -> Path:
    """Return what `path_text` does, as a path."""
    return Path(path_text(text))
