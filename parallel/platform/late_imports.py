"""Lets torch import what only its compiler needs at the first use, since the CPU platform compiles nothing.

Importing it takes a rank several seconds. Installed by `apply_cpu_patches` alone, before Megatron-Core comes.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

SYMBOLIC_SHAPES = "torch.fx.experimental.symbolic_shapes"
"""Where torch imports sympy, 3 s; the DTensor operators take one function from it, for symbolic sizes."""


class LateModule(types.ModuleType):
    """Stands for a module until one of its functions is called or one of its classes is named."""

    def __getattr__(self, name: str) -> Any:
        """Return a function that imports the module when it is called, but the thing itself for a class."""
        if name.startswith("__"):  # Python's own questions, such as __path__
            raise AttributeError(name)
        if name.lstrip("_")[0].isupper():
            return getattr(self._import(), name)

        def call(*args: Any, **kwargs: Any) -> Any:
            return getattr(self._import(), name)(*args, **kwargs)

        return call

    def _import(self) -> types.ModuleType:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return importlib.import_module(self.__name__)


def import_late(module_name: str) -> None:
    """Put a `LateModule` in the place of a module that has not been imported yet."""
    if module_name not in sys.modules:
        parent, _, name = module_name.rpartition(".")
        late = sys.modules[module_name] = LateModule(module_name)
        setattr(importlib.import_module(parent), name, late)
