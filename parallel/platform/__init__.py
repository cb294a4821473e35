"""Finds the platform of this machine; the only folder that knows devices by name."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from configs.errors import BadInput
from parallel.platform.base import Platform, PlatformName

__all__ = ["Platform", "PlatformName"]
PLATFORM_VARIABLE = "SHARDWRIGHT_PLATFORM"
CLUSTER_PLATFORM: PlatformName = "cuda"
"""What a plan is made for, on whatever machine it is made."""


def detect_platform_name() -> PlatformName:
    """Return the platform to use, without importing torch: `SHARDWRIGHT_PLATFORM` if set, else what the machine has."""
    forced = os.environ.get(PLATFORM_VARIABLE)
    if forced == "cpu":
        return "cpu"
    if forced == "cuda":
        return "cuda"
    if forced is not None:
        raise BadInput(f"{PLATFORM_VARIABLE}={forced!r} is not a platform; use cpu or cuda, or unset it.")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    return "cuda" if not hidden and Path("/dev/nvidiactl").exists() else "cpu"


def has_transformer_engine() -> bool:
    """Return whether Transformer Engine is installed, without importing it."""
    return importlib.util.find_spec("transformer_engine") is not None


def load_platform(name: PlatformName) -> Platform:
    """Return the platform object; imports torch but not yet Megatron-Core."""
    if name == "cuda":
        from parallel.platform.cuda import CudaPlatform

        return CudaPlatform()
    from parallel.platform.cpu import CpuPlatform

    return CpuPlatform()
