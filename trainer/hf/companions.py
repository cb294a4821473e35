"""The small files of a Hugging Face model beside its weights: tokenizer, chat templates, generation config, code.

Torch-free; the code is copied and read for what it imports, never run.
A run keeps those of the model it began from under `<run.dir>/hf/`, so that an export has what the import had.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.errors import BadInput
from trainer.data.chat.behaviour import observe
from trainer.data.chat.template import load_template
from trainer.data.tokenizer import find_tokenizer_directory, load_tokenizer
from trainer.hf.config_json import load_config_json

FOLDER = "hf"
_SUFFIXES = {".json", ".jinja", ".model", ".txt", ".tiktoken"}
_TOKENIZER = "tokenizer.model"  # Mistral's end in .v3 and the like
_TEMPLATES = "additional_chat_templates"
_NO_LIMIT = 1e20  # transformers writes 1e30 for a tokenizer that sets none
_RELATIVE_IMPORT = re.compile(r"^\s*(?:from|import)\s+\.(\w+)", re.MULTILINE)


def carried_folder(run_dir: Path) -> Path | None:
    """Return where a run keeps what it carries, None if it began from no Hugging Face model."""
    folder = run_dir / FOLDER
    return folder if (folder / "config.json").is_file() else None


def carry(source: Path, run_dir: Path) -> None:
    """Copy `config.json` and the companions of the model in `source` under a run directory."""
    folder = run_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    _copy_companions(source, folder)
    shutil.copyfile(source / "config.json", folder / "config.json")


def companion_files(directory: Path) -> Iterator[Path]:
    """Yield the companions in a directory, without `config.json` and the indexes of weights."""
    for file in sorted([*directory.iterdir(), *(directory / _TEMPLATES).glob("*.jinja")]):
        is_one = file.suffix in _SUFFIXES or file.name.startswith(_TOKENIZER)
        if is_one and file.is_file() and file.name != "config.json" and ".index." not in file.name:
            yield file
    code = {file for settings in _settings_files(directory) for file in _needed_code(_read(settings), directory)}
    yield from sorted(file for file in code if file.is_file())


def write_companions(target: Path, carried: Path | None, tokenizer: str | None) -> None:
    """Copy to an export what the run carried, and over it the files of the tokenizer that it was trained with."""
    for folder in (carried, Path(tokenizer) if tokenizer is not None else None):
        if folder is not None and folder.is_dir():
            _copy_companions(folder if folder == carried else find_tokenizer_directory(folder), target)


def write_chat_template(target: Path, template: str) -> None:
    """Give an export, whose tokenizer is there, a chat template by name or file, and let generation end where turns do.

    Raises BadInput where the template is no longer there.
    """
    chat = load_template(template, target)
    tokenizer = load_tokenizer(str(target))
    (target / "chat_template.jinja").write_text(chat.text, encoding="utf-8")
    end = observe(chat, tokenizer).end_token
    if end is None:
        return
    file = target / "generation_config.json"
    settings = _read(file) if file.is_file() else {}
    known = settings.get("eos_token_id", [])
    ids = [tokenizer.backend.token_to_id(end), tokenizer.eod_id, *(known if isinstance(known, list) else [known])]
    _write(file, settings | {"eos_token_id": list(dict.fromkeys(ids))})


def drop_missing_code(directory: Path) -> list[str]:
    """Take out of `auto_map` what names code that is not there, and return one sentence for each file with such.

    With `trust_remote_code` transformers would fail for lack of it; without, it has its own code for all families here.
    """
    notes = []
    for file in _settings_files(directory):
        settings = _read(file)
        whole, missing = {}, set()
        for kind, reference in (settings.get("auto_map") or {}).items():
            absent = [
                code.name for code in _needed_code({"auto_map": {kind: reference}}, directory) if not code.is_file()
            ]
            missing.update(absent)
            if not absent:
                whole[kind] = reference
        if missing:
            del settings["auto_map"]
            settings |= {"auto_map": whole} if whole else {}
            _write(file, settings)
            notes.append(f"{file.name}: auto_map named {', '.join(sorted(missing))}, which is not there; left out")
    return notes


def set_token_limit(directory: Path, num_tokens: int) -> list[str]:
    """Let the tokenizer in a directory name the model's longest sequence where it names another; return what was said.

    A tokenizer that sets no limit goes on setting none.
    """
    file = directory / "tokenizer_config.json"
    settings = _read(file) if file.is_file() else {}
    limit = settings.get("model_max_length")
    if not isinstance(limit, int | float) or limit > _NO_LIMIT or limit == num_tokens:
        return []
    _write(file, settings | {"model_max_length": num_tokens})
    return [f"{file.name}: model_max_length was {limit}, now {num_tokens} as the model's"]


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
        text = _content(settings.get(f"{kind}_token"))
        if text in ids:
            found[f"{kind}_token_id"] = ids[text]
    return found


def set_padding(target: Path) -> tuple[int | None, list[str]]:
    """Choose what pads rows of answers in an export, let its tokenizer name that too, and return the id and notes.

    A sequence classifier of transformers takes the value at the last token that is not padding, so that no token serves
    that ends a turn. Of these the first: the tokenizer's own, one that is called so, what ends documents, the unknown.
    """
    if not (target / "tokenizer.json").is_file():
        return None, ["config.json: no pad_token_id, as no tokenizer is known; score answers one by one, or set it"]
    tokenizer, file = load_tokenizer(str(target)), target / "tokenizer_config.json"
    settings = _read(file) if file.is_file() else {}
    special = [token.content for token in tokenizer.backend.get_added_tokens_decoder().values() if token.special]
    named = [_content(settings.get("pad_token")), *(token for token in special if "pad" in token.lower())]
    try:
        end = observe(load_template(None, target), tokenizer).end_token
    except BadInput:  # no chat template
        end = None
    for token in (*named, tokenizer.eod_token, _content(settings.get("unk_token"))):
        number = None if token is None else tokenizer.backend.token_to_id(token)
        if token != end and number is not None:
            _write(file, settings | {"pad_token": token})
            return number, []
    return None, [f"config.json: no pad_token_id, as {end} ends turns and nothing else pads; score answers one by one"]


def _content(token: Any) -> str | None:
    """Return the text of a token as `tokenizer_config.json` spells it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _copy_companions(source: Path, target: Path) -> None:
    for file in companion_files(source):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


def _settings_files(directory: Path) -> list[Path]:
    """Return the files that may name code in an `auto_map`."""
    return sorted(file for file in directory.glob("*config.json") if file.is_file())


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{file}: cannot be read ({error}); download it again.") from error
    return content if isinstance(content, dict) else {}


def _write(file: Path, settings: dict[str, Any]) -> None:
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _needed_code(settings: dict[str, Any], directory: Path) -> set[Path]:
    """Return the files that an `auto_map` names in this directory, and those that these import from beside them."""
    references = settings.get("auto_map")
    found: set[Path] = set()
    waiting = []
    for entry in references.values() if isinstance(references, dict) else ():
        for reference in entry if isinstance(entry, list) else [entry]:
            module = reference.partition(".")[0] if isinstance(reference, str) and "--" not in reference else ""
            if module.isidentifier():  # "organisation/name--module.Class" lies in a repository of its own
                waiting.append(directory / f"{module}.py")
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
            waiting += [directory / f"{module}.py" for module in _RELATIVE_IMPORT.findall(text)]
    return found
