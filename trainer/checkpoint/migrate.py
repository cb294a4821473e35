"""The `checkpoint.json` of any version -> today's: renamed fields by their new names, missing ones with their defaults.

Torch-free. What this version does not know it refuses by name: it may be what the weights mean.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from configs.errors import BadInput
from configs.fields import location_text
from configs.load import resolved_dict
from configs.sentences import validation_sentences
from configs.stages import STAGE_CONFIGS, Config

RENAMED_AFTER: dict[int, dict[str, str]] = {}
"""By the last format version that had them: the old dotted names of fields of the config, and what they became."""


def rename_fields(saved: Mapping[str, Any], format_version: int) -> dict[str, Any]:
    """Return a saved config with the fields of earlier format versions under their new names."""
    values = _copy(saved)
    for version in sorted(RENAMED_AFTER):
        if format_version <= version:
            for old, new in RENAMED_AFTER[version].items():
                _move(values, old.split("."), new.split("."))
    return values


def resolve_saved(values: Mapping[str, Any], stage: str, where: Path) -> dict[str, Any]:
    """Return a saved config, its fields renamed, as today's version would have written it.

    Raises BadInput naming the fields that this version does not know, and ValueError for values it cannot read.
    """
    schema = STAGE_CONFIGS.get(stage, Config)
    try:
        config = schema.model_validate(values)
    except ValidationError as error:
        unknown = [location_text(detail["loc"]) for detail in error.errors() if detail["type"] == "extra_forbidden"]
        refuse_unknown([f"config.{name}" for name in unknown], where)
        raise ValueError("; ".join(validation_sentences(error, schema))) from error
    return resolved_dict(config)


def refuse_unknown(names: Collection[str], where: Path) -> None:
    """Raise BadInput if there are fields that only another version can have written."""
    if names:
        raise BadInput(
            f"{where}: is unreadable to this version, which does not know {', '.join(names)}; use the version that "
            "wrote it, also to export its weights (tools/convert_hf.py export)."
        )


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _copy(value) if isinstance(value, Mapping) else value for name, value in values.items()}


def _move(values: dict[str, Any], old: list[str], new: list[str]) -> None:
    """Move the value at one path of nested sections to another, if it is there; no empty section stays behind."""
    sections = [values]
    for name in old[:-1]:
        inner = sections[-1].get(name)
        if not isinstance(inner, dict):
            return
        sections.append(inner)
    if old[-1] not in sections[-1]:
        return
    value = sections[-1].pop(old[-1])
    for section, name in zip(reversed(sections[:-1]), reversed(old[:-1]), strict=True):
        if not section[name]:
            del section[name]
    target = values
    for name in new[:-1]:
        if not isinstance(target.get(name), dict):
            target[name] = {}
        target = target[name]
    target[new[-1]] = value
