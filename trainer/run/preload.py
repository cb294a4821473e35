"""Imports all that a rank of the CPU platform needs, so that ranks can be forked from a process that has it.

Starts no thread, opens no device and joins no group: nothing of that survives a fork.
"""

from __future__ import annotations

import gc
import importlib
import pkgutil

import trainer
from parallel.platform import load_platform

_REWARDS = "trainer.environments.rewards."
"""Imported by the processes that score alone; some need packages that are not always there."""


def preload() -> None:
    """Import torch, Megatron-Core and every module of `trainer`, and keep them out of later garbage collections."""
    load_platform("cpu").activate(0)
    for module in pkgutil.walk_packages(trainer.__path__, "trainer."):
        if not module.name.startswith(_REWARDS):
            importlib.import_module(module.name)
    gc.collect()
    gc.freeze()
