"""Which files of a downloaded Hugging Face dataset are not for training: as its README.md says, else as they are named.

Words and fields are those of `datasets.load_dataset` (Hub documentation: "File names and splits", "Data files
Configuration") and of `save_to_disk`. Torch-free; opens no data.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLITS = {word: split for split, words in _WORDS.items() for word in words}
_NAMED = re.compile(rf"(?:^|[-._ 0-9/])({'|'.join(_SPLITS)})(?=[-._ 0-9/]|$)", re.IGNORECASE)
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\b.*")  # a split of any name: `unsupervised-00000-of-00001.parquet`
_WILDCARDS = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}


def find_other_splits(directory: Path, files: Iterable[Path], records: set[Path]) -> dict[Path, str]:
    """Return the files that are of another split than train, with its name; none where nothing is of the train split.

    A name tells the split of `records` (JSONL, Parquet) alone: text files are called train.py and test.py for reasons
    of their own.
    """
    listed = list(_read_configs(directory / "README.md"))
    saved = {folder: split for holder in {file.parent.parent for file in records} for folder, split in _saved(holder)}
    splits: dict[Path, str] = {}
    for file in files:
        name = file.relative_to(directory).as_posix()
        found = {split for pattern, split in listed if pattern.fullmatch(name)}
        if not found and file in records:
            found = {saved.get(file.parent) or _find_split(name)} - {""}
        if found:
            splits[file] = "train" if "train" in found else min(found)
    with_shards = {file.parent for file, split in splits.items() if split == "train" and _shard_name(file)}
    splits |= _find_sharded(records - splits.keys(), with_shards)
    return {file: split for file, split in splits.items() if split != "train" and "train" in splits.values()}


def _find_split(name: str) -> str:
    """Return the split that a path names, `test` of `data/test_sft-0.parquet`, empty if none; folders come first."""
    word = _NAMED.search(name)
    return _SPLITS[word.group(1).lower()] if word else ""


def _saved(holder: Path) -> Iterator[tuple[Path, str]]:
    """Yield each folder in `holder` that `DatasetDict.save_to_disk` made, and its split."""
    try:
        splits = json.loads((holder / "dataset_dict.json").read_bytes())["splits"]
        yield from ((holder / split, _find_split(split) or split) for split in splits)
    except (OSError, ValueError, TypeError, KeyError):
        return  # there is none, or it is of another kind; the names remain


def _find_sharded(files: set[Path], folders: set[Path]) -> dict[Path, str]:
    """Return those of `files` that lie in `folders`, beside shards of the train split, and are shards, by split."""
    return {file: split for file in files if file.parent in folders and (split := _shard_name(file))}


def _shard_name(file: Path) -> str:
    """Return what a shard is one of, `train` of `train-00000-of-00002.parquet`; empty for what is no shard."""
    shard = _SHARD.fullmatch(file.name)
    return shard.group(1) if shard else ""


def _read_configs(card: Path) -> Iterator[tuple[re.Pattern[str], str]]:
    """Yield the pattern of paths and the split of each entry under `configs:` in the YAML block of a dataset's card."""
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    block = re.match(r"---\s*\n(.*?\n)---", text, re.DOTALL)
    if block is None:
        return
    import yaml

    try:
        configs = yaml.safe_load(block.group(1)).get("configs")
        for config in configs or ():
            for split, pattern in _entries(config.get("data_files")):
                yield _compile(pattern), _find_split(split) or split
    except (yaml.YAMLError, AttributeError, TypeError, KeyError, re.error):
        return  # a card may hold anything; the names remain


def _entries(data_files: Any) -> Iterator[tuple[str, str]]:
    """Yield (split, pattern) of `data_files` in each form it may have; without a split it is the train split's."""
    if isinstance(data_files, dict):
        data_files = [{"split": split, "path": path} for split, path in data_files.items()]
    for entry in [data_files] if isinstance(data_files, str) else data_files or ():
        split, paths = ("train", entry) if isinstance(entry, str) else (entry["split"], entry["path"])
        for path in [paths] if isinstance(paths, str) else paths:
            yield str(split), str(path)


def _compile(pattern: str) -> re.Pattern[str]:
    """Compile a pattern of paths: `**` crosses folders, `*` and `?` do not; a folder means all in it."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]+\])", pattern.removeprefix("./").rstrip("/"))
    return re.compile(
        "".join(
            _WILDCARDS.get(part) or (part.replace("[!", "[^") if part.startswith("[") else re.escape(part))
            for part in parts
        )
        + "(?:/.*)?"
    )
