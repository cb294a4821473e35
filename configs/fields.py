"""Every field of the schema by its dotted path: type in words, default, unit, a value that works. Knows no YAML."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from configs.sections.base import PathKind, Section


@dataclass(frozen=True)
class SchemaField:
    """One field of a section, or a section itself."""

    path: str
    info: FieldInfo
    given: Any = None
    """The default where the section around it has other values than its class; else None."""

    @property
    def section(self) -> type[Section] | None:
        """The class of the section behind this field; None for a plain value."""
        return _section_class(self.info.annotation)

    @property
    def required(self) -> bool:
        return self.info.is_required()

    @property
    def doc(self) -> str:
        return " ".join((self.info.description or "").split())

    @property
    def type_text(self) -> str:
        return _type_text(self.info.annotation, self.info.metadata)

    @property
    def default_text(self) -> str:
        if self.required:
            return "required"
        return (
            value_text(self.given)
            if self.given is not None
            else value_text(self.info.get_default(call_default_factory=True))
        )

    @property
    def example(self) -> str:
        """A value that passes this field's own rules, as one would type it."""
        default = self.info.get_default(call_default_factory=True)
        if self.info.examples:
            return value_text(self.info.examples[0])
        if self.required or default in (None, ()):
            return _example(self.info.annotation, self.info.metadata)
        return value_text(default)

    @property
    def path_kind(self) -> PathKind | None:
        """What kind of path the field holds; None for anything else."""
        bounds = [
            bound for member in _members(self.info.annotation) for bound in _unwrap(member, self.info.metadata)[1]
        ]
        return next((bound for bound in reversed(bounds) if isinstance(bound, PathKind)), None)

    @property
    def item_example(self) -> str:
        """One item of a list field, as one would type it."""
        if self.info.examples and isinstance(self.info.examples[0], list):
            return value_text(self.info.examples[0][0])
        return _example(self.info.annotation, self.info.metadata).removeprefix("[").removesuffix("]")


def schema_fields(section: type[Section], prefix: str = "", given: Any = None) -> Iterator[SchemaField]:
    """Yield every section and field of a schema, depth first, in the order they are written.

    `given` is the section's own default, whose values are then those of its fields.
    """
    for name, info in section.model_fields.items():
        field = SchemaField(prefix + name, info, getattr(given, name, None))
        yield field
        if field.section is not None:
            own = field.given if field.given is not None else info.get_default(call_default_factory=True)
            yield from schema_fields(field.section, field.path + ".", own if isinstance(own, Section) else None)


def path_values(section: Section, prefix: str = "") -> Iterator[tuple[str, str, PathKind]]:
    """Yield every path that a config holds: its field, its text, and what kind of path it is."""
    for name, info in type(section).model_fields.items():
        field, value = SchemaField(prefix + name, info), getattr(section, name)
        kind = field.path_kind
        if isinstance(value, Section):
            yield from path_values(value, f"{field.path}.")
        elif isinstance(value, tuple):
            for number, item in enumerate(value):
                if isinstance(item, Section):
                    yield from path_values(item, f"{field.path}[{number}].")
        elif kind is not None and value is not None and value not in kind.words:
            yield field.path, value, kind


def field_at(location: Sequence[str | int], schema: type[Section]) -> SchemaField | None:
    """Return the field at a location such as ("data", "train", 0, "path"), or None when the schema has none there."""
    section: type[Section] | None = schema
    field: SchemaField | None = None
    for depth, part in enumerate(location, start=1):
        if isinstance(part, int):
            section = _item_class(field.info.annotation) if field else None
            continue
        if section is None or part not in section.model_fields:
            return None
        field = SchemaField(location_text(location[:depth]), section.model_fields[part])
        section = field.section
    return field


def location_text(location: Sequence[str | int]) -> str:
    """Write a location as a dotted path: ("data", "train", 0, "path") -> data.train[0].path."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def value_text(value: Any) -> str:
    """Write a value the way it is typed in YAML or in an override."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Section | Mapping):
        items = value.items() if isinstance(value, Mapping) else value
        return "{" + ", ".join(f"{name}: {value_text(item)}" for name, item in items) + "}"
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(value_text(item) for item in value) + "]"
    return str(value)


def _members(annotation: Any) -> tuple[Any, ...]:
    """Split a union into its members; anything else is its own only member."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _section_class(annotation: Any) -> type[Section] | None:
    for member in _members(annotation):
        if isinstance(member, type) and issubclass(member, Section):
            return member
    return None


def _item_class(annotation: Any) -> type[Section] | None:
    """Return the section class of a list's items, if they are sections."""
    for member in _members(annotation):
        if get_origin(member) is tuple:
            return _section_class(get_args(member)[0])
    return None


def _unwrap(annotation: Any, metadata: Sequence[Any]) -> tuple[Any, list[Any]]:
    """Strip `Annotated` and pydantic's `Field`, leaving the bare type and its bounds."""
    bounds = list(metadata)
    if get_origin(annotation) is Annotated:
        annotation, *extra = get_args(annotation)
        for item in extra:
            bounds += item.metadata if isinstance(item, FieldInfo) else [item]
    return annotation, bounds


def _type_text(annotation: Any, metadata: Sequence[Any]) -> str:
    members = _members(annotation)
    if len(members) > 1:
        return " or ".join(_type_text(member, ()) for member in members)
    bare, bounds = _unwrap(annotation, metadata)
    if bare is type(None):
        return "null"
    if get_origin(bare) is Literal:
        return " | ".join(str(choice) for choice in get_args(bare))
    if get_origin(bare) is tuple:
        return f"list of {_type_text(get_args(bare)[0], ())}"
    if isinstance(bare, type) and issubclass(bare, Section):
        return "{" + ", ".join(bare.model_fields) + "}"
    kinds = [bound for bound in bounds if isinstance(bound, PathKind)]
    text = " | ".join((*kinds[-1].words, "path")) if kinds else "text"
    name = {int: "int", float: "float", bool: "true | false", str: text}.get(bare, str(bare))
    for bound in bounds:
        if isinstance(bound, annotated_types.Ge):
            name += f" >= {bound.ge}"
        elif isinstance(bound, annotated_types.Gt):
            name += f" > {bound.gt}"
        elif isinstance(bound, annotated_types.Le) and isinstance(bound.le, int | float) and bound.le < 10**5:
            name += f" <= {bound.le}"
    return name


def _example(annotation: Any, metadata: Sequence[Any]) -> str:
    bare, bounds = _unwrap(_members(annotation)[0], metadata)
    if get_origin(bare) is Literal:
        return str(get_args(bare)[0])
    if get_origin(bare) is tuple:
        return f"[{_example(get_args(bare)[0], ())}]"
    if isinstance(bare, type) and issubclass(bare, Section):
        inner = [SchemaField(name, info) for name, info in bare.model_fields.items()]
        return "{" + ", ".join(f"{field.path}: {field.example}" for field in inner if field.required) + "}"
    if bare is bool:
        return "true"
    if bare is str:
        return "some/path" if any(isinstance(bound, PathKind) for bound in bounds) else "text"
    least = [bound.ge for bound in bounds if isinstance(bound, annotated_types.Ge)]
    return str(least[0] if least else 1)
