"""The small files of a Hugging Face model beside its weights: tokenizer, chat template, generation config. Torch-free.

A run keeps those of the model it began from under `<run.dir>/hf/`, so that an export has what the import had.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.errors import BadInput
from trainer.hf.config_json import load_config_json
from trainer.hf.names import INDEX_NAME

FOLDER = "hf"
_SUFFIXES = {".json", ".jinja", ".model", ".txt", ".tiktoken"}
_NOT_CARRIED = {INDEX_NAME, "pytorch_model.bin.index.json", "config.json"}


def carried_folder(run_dir: Path) -> Path | None:
    """Return where a run keeps what it carries, None if it began from no Hugging Face model."""
    folder = run_dir / FOLDER
    return folder if (folder / "config.json").is_file() else None


def carry(source: Path, run_dir: Path) -> None:
    """Copy `config.json` and the companions of the model in `source` under a run directory."""
    folder = run_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for file in companion_files(source):
        shutil.copyfile(file, folder / file.name)
    shutil.copyfile(source / "config.json", folder / "config.json")


def companion_files(directory: Path) -> Iterator[Path]:
    """Yield the companions in a directory, without `config.json`."""
    for file in sorted(directory.iterdir()):
        if file.is_file() and file.suffix in _SUFFIXES and file.name not in _NOT_CARRIED:
            yield file


def write_companions(target: Path, carried: Path | None, tokenizer: str | None) -> None:
    """Copy to an export what the run carried, and over it the files of the tokenizer that it was trained with."""
    for folder in (carried, Path(tokenizer) if tokenizer is not None else None):
        if folder is not None and folder.is_dir():
            for file in companion_files(folder):
                shutil.copyfile(file, target / file.name)


def carried_config(carried: Path | None) -> dict[str, Any] | None:
    """Return the `config.json` that a run carried."""
    return None if carried is None else load_config_json(carried)


def token_ids(target: Path) -> dict[str, int]:
    """Return the ids of the special tokens that the tokenizer in an export names, as `config.json` keys."""
    try:
        settings = json.loads((target / "tokenizer_config.json").read_text(encoding="utf-8"))
        vocabulary = json.loads((target / "tokenizer.json").read_text(encoding="utf-8"))
    except OSError:
        return {}
    except ValueError as error:
        raise BadInput(f"{target}: the tokenizer's files cannot be read ({error}); make them again.") from error
    ids = {token["content"]: token["id"] for token in vocabulary.get("added_tokens", ())}
    ids |= {token: number for token, number in (vocabulary["model"].get("vocab") or {}).items() if token not in ids}
    found = {}
    for kind in ("bos", "eos", "pad"):
        token = settings.get(f"{kind}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if text in ids:
            found[f"{kind}_token_id"] = ids[text]
    return found
