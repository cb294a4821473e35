"""A run's YAML with its `base:` chain, plus dotted overrides from the command line -> one frozen `Config`; a cluster's.

Scalars are kept as the text that was typed and converted by the field's type, so `3e-4` is a number where a number
is wanted and `name: 123` stays text. Rules that span fields are `configs.rules`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from configs.errors import BadInput, in_one_line
from configs.fields import field_at
from configs.paths import clean_path, find_special_file, shortened
from configs.sections.cluster import ClusterConfig
from configs.sentences import validation_sentences
from configs.stages import STAGE_CONFIGS, Config

_MERGE_TAG = "tag:yaml.org,2002:merge"
_IMPLICIT_TAGS = ("tag:yaml.org,2002:null", _MERGE_TAG)
_NULL_WORDS = ("", "null", "Null", "NULL", "~")
_HALF_CHARACTER = (
    "half a character (a surrogate without its other half), or bytes that are not UTF-8 text; write it whole"
)


class _HalfCharacter(yaml.MarkedYAMLError):
    """Text that no file and no terminal could be given."""


class _TextLoader(yaml.SafeLoader):
    """SafeLoader that resolves only null and merge keys, and refuses duplicate keys and halves of characters."""

    yaml_implicit_resolvers = {
        first: [(tag, regexp) for tag, regexp in resolvers if tag in _IMPLICIT_TAGS]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        first_line: dict[str, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == _MERGE_TAG:
                continue
            key = self.construct_object(key_node)
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError(problem="a key must be a name", problem_mark=key_node.start_mark)
            if key in first_line:
                problem = f"key {key!r} is given twice (first in line {first_line[key]}); keep one"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
            first_line[key] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value = super().construct_scalar(node)
        try:
            return _join_halves(value) if isinstance(value, str) else value
        except UnicodeDecodeError:
            raise _HalfCharacter(problem=_HALF_CHARACTER, problem_mark=node.start_mark) from None


def stage_of_recipe(path: str) -> str | None:
    """Return the stage that a recipe's folder or file is named after; None where there is none."""
    names = (Path(path).parent.name, Path(path).stem)
    return next((name for name in names if name in STAGE_CONFIGS), None)


def load_config(path: str, overrides: Sequence[str] = (), stage: str = "pretrain") -> Config:
    """Read a stage's YAML file and its bases, apply `section.field=value` overrides, validate, fill `run.dir`.

    Raises BadInput with one line per problem: all of them at once, unless a file cannot be read.
    """
    config, problems = read_config(path, overrides, stage)
    if problems or config is None:
        raise BadInput("\n".join(problems))
    return config


def read_config(path: str, overrides: Sequence[str], stage: str) -> tuple[Config | None, list[str]]:
    """Return what `load_config` does and what is wrong with it, so that it can be told with what else is.

    Unknown fields are left out; there is no config where anything more is wrong. Raises BadInput for a file that cannot
    be read.
    """
    return config_of(_read_whole(path), overrides, stage)


def config_of(values: dict[str, Any], overrides: Sequence[str], stage: str) -> tuple[Config | None, list[str]]:
    """Return what `read_config` does, of sections that are already there; they are changed."""
    problems: list[str] = []
    for override in overrides:
        problem = _apply_override(values, override, stage)
        if problem:
            problems.append(problem)
    try:
        config = STAGE_CONFIGS[stage].model_validate(values)
    except ValidationError as error:
        is_judged = not problems and _drop_unknown(values, error)
        problems += validation_sentences(error, STAGE_CONFIGS[stage])
        if not is_judged:
            return None, problems
        config = STAGE_CONFIGS[stage].model_validate(values)
    if config.run.dir is None:
        run = config.run.model_copy(update={"dir": _default_run_dir(config.run.name)})
        config = config.model_copy(update={"run": run})
    return config, problems


def load_cluster(path: str) -> ClusterConfig:
    """Read a cluster's YAML file and its bases, and validate. Raises BadInput with one line per problem."""
    values = _read_whole(path)
    try:
        return ClusterConfig.model_validate(values)
    except ValidationError as error:
        sentences = validation_sentences(error, ClusterConfig)
        raise BadInput("\n".join(f"{path}: {sentence}" for sentence in sentences)) from None


def _drop_unknown(values: dict[str, Any], error: ValidationError) -> bool:
    """Take the unknown fields out of `values`, but return False if more than they is wrong."""
    details = error.errors()
    if any(detail["type"] != "extra_forbidden" for detail in details):
        return False
    for detail in details:
        *place, name = detail["loc"]
        section: Any = values
        for part in place:
            section = section[part]
        del section[name]
    return True


def resolved_dict(config: Config) -> dict[str, Any]:
    """Return every field with its value as JSON types; written to a file it loads back to an equal config."""
    return config.model_dump(mode="json")


def _read_whole(path: str) -> dict[str, Any]:
    """Read a file and its bases."""
    try:
        return _read_chain(_config_path(path), ())
    except RecursionError:
        raise BadInput(f"{path}: nested too deep, or an anchor that holds itself; write it flat") from None


def _read_chain(path: str, chain: tuple[str, ...]) -> dict[str, Any]:
    """Read a file and merge it over its bases; `chain` holds the files that led here."""
    if os.path.realpath(path) in [os.path.realpath(link) for link in chain]:
        raise BadInput(f"base: the chain {' -> '.join((*chain, path))} is a cycle; remove one of these base: lines")
    values = _read_file(path, chain)
    bases = values.pop("base", [])
    if isinstance(bases, str):
        bases = [bases]
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise BadInput(f"{path}: base: must be a path or a list of paths, such as ../models/tiny.yaml")
    merged: dict[str, Any] = {}
    for base in bases:
        base_path = os.path.normpath(os.path.join(os.path.dirname(path), _config_path(base)))
        merged = _merge(merged, _read_chain(base_path, (*chain, path)))
    return _merge(merged, values)


def _config_path(text: str) -> str:
    try:
        return clean_path(text)
    except ValueError as error:
        raise BadInput(f"the path of the config {error}; give one such as configs/demo/pretrain.yaml") from None


def _default_run_dir(name: str) -> str:
    """Return `runs/<name>`. Raises BadInput where that would lie elsewhere, or can be no directory."""
    path = os.path.join("runs", name)
    advice = "a value that would work: run, or set run.dir"
    if not os.path.normpath(path).startswith(os.path.join("runs", "")):
        raise BadInput(
            f"run.name: {shortened(name)} makes {shortened(path)} the run directory, outside runs/; {advice}"
        )
    try:
        return clean_path(path)
    except ValueError as error:
        raise BadInput(f"run.name: as a directory, {error}; {advice}") from None


def _read_file(path: str, chain: tuple[str, ...]) -> dict[str, Any]:
    named_by = f", which {chain[-1]} names as its base," if chain else ""
    special = find_special_file(path)
    if special is not None:
        raise BadInput(f"{path}{named_by} is {special}, and every rank reads the config; write it to a YAML file first")
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.load(file, Loader=_TextLoader)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise BadInput(f"{path}{named_by} cannot be read ({reason}); give an existing YAML file") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}{named_by} is not UTF-8 text; give a YAML file") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise BadInput(f"{path}{line}: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a tag such as !!int on text that is none
        raise BadInput(f"{path}: not YAML ({in_one_line(error)})") from error
    if not isinstance(values, dict):
        found = "is empty" if values is None else "holds no sections"
        raise BadInput(
            f"{path}{named_by} {found}; its top level must be sections such as `model:` and `train:`, or a "
            "cluster's fields such as `gpus_per_node: 8`"
        )
    return values


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two mappings without touching either: sections field by field, everything else is replaced."""
    merged = {key: _merge(value, {}) if isinstance(value, dict) else value for key, value in below.items()}
    for key, value in above.items():
        if isinstance(value, dict):
            lower = merged.get(key)
            merged[key] = _merge(lower if isinstance(lower, dict) else {}, value)
        else:
            merged[key] = value
    return merged


def _apply_override(values: dict[str, Any], override: str, stage: str) -> str | None:
    """Set one `a.b.c=value` in place; return the problem if it cannot be set."""
    path, equals, text = override.partition("=")
    parts = path.strip().split(".")
    if not equals or not all(parts):
        return f"override {override!r}: not of the form section.field=value, such as train.num_steps=100"
    if parts[0] == "base":
        return "base: cannot be overridden on the command line; name the base in the YAML file"
    try:
        value = _parse_value(text.strip())
    except (_HalfCharacter, UnicodeDecodeError):
        return f"{path}: {shortened(text.strip())} holds {_HALF_CHARACTER}"
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = getattr(error, "problem", None) or "not a YAML value"
        return f"{path}: {text.strip()!r} cannot be read ({problem}); quote the text or close the bracket"
    section = values
    for depth, part in enumerate(parts[:-1], start=1):
        if section.get(part) is None:
            section[part] = {}
        section = section[part]
        if not isinstance(section, dict):
            whole = ".".join(parts[:depth])
            field = field_at(parts[:depth], STAGE_CONFIGS[stage])
            example = field.example if field else "value"
            return f"{path}: {whole} has no fields of its own; give it whole, such as {whole}={example}"
    section[parts[-1]] = value
    return None


def _parse_value(text: str) -> Any:
    """Read lists, maps and quoted text as YAML; everything else is null or the text as it stands."""
    if text[:1] in ("[", "{", '"', "'"):
        return yaml.load(text, Loader=_TextLoader)
    return None if text in _NULL_WORDS else _join_halves(text)


def _join_halves(text: str) -> str:
    """Return text with its surrogate pairs, in which JSON escapes an emoji, as the characters they mean.

    Raises UnicodeDecodeError for half a pair, and for the bytes of a command line that are not UTF-8.
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16")
