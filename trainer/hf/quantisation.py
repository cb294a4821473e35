"""Which quantised weights can be read: FP8 by blocks, as DeepSeek-V3 and Kimi-K2 are published. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

QUANTISATION_KEY = "quantization_config"
SCALE_SUFFIX = "_scale_inv"
"""What follows the name of a quantised weight in that of its scales."""


def read_block_size(config: Mapping[str, Any]) -> tuple[tuple[int, int] | None, list[str]]:
    """Return rows and columns of a block that shares one scale, None if nothing is quantised; and what is not read."""
    given = config.get(QUANTISATION_KEY)
    if given is None:
        return None, []
    if not isinstance(given, Mapping):
        return None, [f"{QUANTISATION_KEY}: {given!r} is no mapping"]
    only = {"quant_method": ("fp8",), "fmt": ("e4m3", None), "activation_scheme": ("dynamic", None)}
    problems = [
        f"{QUANTISATION_KEY}.{key}: {given.get(key)!r} cannot be converted, only {values[0]!r}, by blocks"
        for key, values in only.items()
        if given.get(key) not in values
    ]
    size = given.get("weight_block_size")
    if isinstance(size, (list, tuple)) and len(size) == 2 and all(type(side) is int and side > 0 for side in size):
        return (size[0], size[1]), problems
    if not problems:
        problems.append(f"{QUANTISATION_KEY}.weight_block_size: {size!r} cannot be converted, only such as [128, 128]")
    return None, problems
