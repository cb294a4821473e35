"""A run's YAML with its `base:` chain, plus dotted overrides from the command line -> one frozen `Config`.

Scalars are kept as the text that was typed and converted by the field's type, so `3e-4` is a number where a number
is wanted and `name: 123` stays text. Rules that span fields are `configs.rules`.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from pydantic import ValidationError

from configs.errors import BadInput
from configs.fields import SchemaField, field_at, location_text, schema_fields, value_text
from configs.stages import Config

_MERGE_TAG = "tag:yaml.org,2002:merge"
_IMPLICIT_TAGS = ("tag:yaml.org,2002:null", _MERGE_TAG)
_NULL_WORDS = ("", "null", "Null", "NULL", "~")
_BOUNDS = {"greater_than_equal": "at least", "greater_than": "above", "less_than_equal": "at most"}
_NOT_A_SECTION = ("model_type", "model_attributes_type", "dict_type")


class _TextLoader(yaml.SafeLoader):
    """SafeLoader that resolves only null and merge keys, and refuses duplicate keys."""

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


def load_config(path: str, overrides: Sequence[str] = ()) -> Config:
    """Read a run's YAML file and its bases, apply `section.field=value` overrides, validate, fill `run.dir`.

    Raises BadInput with one line per problem: all of them at once, unless a file cannot be read.
    """
    try:
        values = _read_chain(path, ())
    except RecursionError:
        raise BadInput(f"{path}: nested too deep, or an anchor that holds itself; write it flat") from None
    problems: list[str] = []
    for override in overrides:
        problem = _apply_override(values, override)
        if problem:
            problems.append(problem)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        problems += [_sentence(detail["type"], detail["loc"], detail) for detail in error.errors()]
    if problems:
        raise BadInput("\n".join(problems))
    if config.run.dir is None:
        run = config.run.model_copy(update={"dir": os.path.join("runs", config.run.name)})
        config = config.model_copy(update={"run": run})
    return config


def resolved_dict(config: Config) -> dict[str, Any]:
    """Return every field with its value as JSON types; written to a file it loads back to an equal config."""
    return config.model_dump(mode="json")


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
        base_path = os.path.normpath(os.path.join(os.path.dirname(path), base))
        merged = _merge(merged, _read_chain(base_path, (*chain, path)))
    return _merge(merged, values)


def _read_file(path: str, chain: tuple[str, ...]) -> dict[str, Any]:
    named_by = f", which {chain[-1]} names as its base," if chain else ""
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
        raise BadInput(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        found = "is empty" if values is None else "holds no sections"
        raise BadInput(f"{path}{named_by} {found}; its top level must be sections such as `model:` and `train:`")
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


def _apply_override(values: dict[str, Any], override: str) -> str | None:
    """Set one `a.b.c=value` in place; return the problem if it cannot be set."""
    path, equals, text = override.partition("=")
    parts = path.strip().split(".")
    if not equals or not all(parts):
        return f"override {override!r}: not of the form section.field=value, such as train.num_steps=100"
    if parts[0] == "base":
        return "base: cannot be overridden on the command line; name the base in the YAML file"
    try:
        value = _parse_value(text.strip())
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
            field = field_at(parts[:depth])
            example = field.example if field else "value"
            return f"{path}: {whole} has no fields of its own; give it whole, such as {whole}={example}"
    section[parts[-1]] = value
    return None


def _parse_value(text: str) -> Any:
    """Read lists, maps and quoted text as YAML; everything else is null or the text as it stands."""
    if text[:1] in ("[", "{", '"', "'"):
        return yaml.load(text, Loader=_TextLoader)
    return None if text in _NULL_WORDS else text


def _sentence(kind: str, location: tuple[str | int, ...], detail: Mapping[str, Any]) -> str:
    """Turn one pydantic error into a sentence that names the field and a value that would work."""
    path = location_text(location)
    if kind == "extra_forbidden":
        return f"{path}: unknown field; {_suggestion(location)}"
    field = field_at(location)
    example = field.example if field else "see --help"
    if isinstance(location[-1], int) and field is not None:
        example = field.item_example
    elif kind in _NOT_A_SECTION and field is not None and field.section is not None:
        example = f"a mapping of {', '.join(field.section.model_fields)}"
    if kind == "missing":
        if len(location) == 1:
            return f"{path}: missing section; add one, or a base: that has it"
        return f"{path}: missing; a value that would work: {example}"
    return f"{path}: {_rule_broken(kind, detail, field)}; a value that would work: {example}"


def _rule_broken(kind: str, detail: Mapping[str, Any], field: SchemaField | None) -> str:
    given = detail["input"]
    is_bound = kind in _BOUNDS
    shown = repr(given) if isinstance(given, str) and not is_bound else value_text(given)
    shown = shown if len(shown) <= 60 else f"{shown[:40]}... ({len(shown)} characters)"
    if kind.startswith("int_"):
        return f"{shown} is not a whole number"
    if kind.startswith("float_"):
        return f"{shown} is not a number"
    if kind == "finite_number":
        return f"{shown} is not a finite number"
    if kind.startswith("bool_"):
        return f"{shown} is not true or false"
    if kind == "string_type":
        return f"{shown} is not text"
    if kind == "string_too_short":
        return "is empty"
    if kind == "literal_error" and field is not None:
        return f"{shown} is not one of {field.type_text.removeprefix('list of ').replace(' | ', ', ')}"
    if kind == "tuple_type":
        return f"{shown} is not a list"
    if kind in _NOT_A_SECTION:
        return f"{shown} is not a section with fields"
    if is_bound:
        return f"{shown} must be {_BOUNDS[kind]} {next(iter(detail['ctx'].values()))}"
    return f"{shown} is refused ({detail['msg']})"


def _suggestion(location: tuple[str | int, ...]) -> str:
    """Name the nearest valid field: a sibling spelt alike, the same name elsewhere, or the nearest dotted path."""
    if any(isinstance(part, int) for part in location):
        parent = field_at(location[:-1])
        return f"its fields are {parent.type_text.removeprefix('list of ')}" if parent else "see --help"
    path = ".".join(str(part) for part in location)
    parent_path, _, name = path.rpartition(".")
    known = [field.path for field in schema_fields()]
    siblings = {other.rpartition(".")[2]: other for other in known if other.rpartition(".")[0] == parent_path}
    close = difflib.get_close_matches(name, siblings, n=1, cutoff=0.7)
    if close:
        return f"did you mean {siblings[close[0]]}?"
    elsewhere = [other for other in known if other.rpartition(".")[2] == name]
    if elsewhere:
        return f"did you mean {difflib.get_close_matches(path, elsewhere, n=1, cutoff=0.0)[0]}?"
    close = difflib.get_close_matches(path, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]}?"
    return f"{parent_path or 'the sections'} {'has' if parent_path else 'are'} {', '.join(siblings)}"
