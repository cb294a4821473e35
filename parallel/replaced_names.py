"""Names of torch and Megatron-Core that are replaced: what, by what, and why. Each table of them is a list to read."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class NamePatch:
    """One attribute replaced: `target` is `module:dotted.name`."""

    target: str
    replacement: Any
    why: str
    is_optional: bool = False
    """Whether the name is there only where another package is installed."""


def resolve(target: str) -> tuple[Any, str, Any]:
    """Return (owner, attribute name, current value) of `module:dotted.name`; raises AttributeError if it is gone."""
    owner, name = _find_owner(target)
    return owner, name, getattr(owner, name)


def replace_names(patches: Iterable[NamePatch]) -> None:
    """Put every replacement in place."""
    for patch in patches:
        owner, name = _find_owner(patch.target)
        if not (patch.is_optional or hasattr(owner, name)):
            raise AttributeError(f"{patch.target} is gone; {patch.why}")
        setattr(owner, name, patch.replacement)


def _find_owner(target: str) -> tuple[Any, str]:
    module_name, _, dotted = target.partition(":")
    owner: Any = importlib.import_module(module_name)
    *parents, name = dotted.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, name
