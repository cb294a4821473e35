"""Sliding windows of `config.json` -> `model.window_*`, and back, as each family says it. Torch-free.

Everywhere a window of n is n keys, the query's own among them: transformers (masking_utils, sliding_window_overlay)
shows query i the keys j with i - n < j <= i.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from configs.plan.derive import layer_windows
from configs.sections.model import ModelConfig

# The keys of the families that say it by layer.
LAYER_KEYS = frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"})
_FULL, _SLIDING = "full_attention", "sliding_attention"


def refuse_window(config: Mapping[str, Any], fields: dict[str, Any]) -> list[str]:
    """Refuse a window shorter than the context in families without one: the cache of transformers cuts to it."""
    window = config.get("sliding_window")
    if window is not None and window < fields["max_position_embeddings"]:
        return [f"sliding_window: attention within {window} tokens is not supported, only null"]
    return []


def read_window(config: Mapping[str, Any], fields: dict[str, Any], default: int | None = None) -> list[str]:
    """Read the one window of all layers (Mistral, Mixtral); `default` is what a config means that has no key."""
    put_windows(fields, config.get("sliding_window", default), [True])
    return []


def write_window(model: ModelConfig) -> dict[str, Any]:
    """Return the keys of `read_window`; another pattern than of all layers cannot be said."""
    return {"sliding_window": model.window_size}


def read_switched_window(config: Mapping[str, Any], fields: dict[str, Any]) -> list[str]:
    """Read the window of all layers behind a switch (Qwen3-MoE)."""
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window", False) else None
    put_windows(fields, window, [True])
    return []


def write_switched_window(model: ModelConfig) -> dict[str, Any]:
    """Return the keys of `read_switched_window`."""
    has_window = model.window_size is not None
    return {"use_sliding_window": has_window} | ({"sliding_window": model.window_size} if has_window else {})


def read_layer_windows(config: Mapping[str, Any], fields: dict[str, Any]) -> list[str]:
    """Read which layers have the window (Qwen2, Qwen3): `layer_types`, or all from `max_window_layers` on."""
    num_layers, types = fields["num_layers"], config.get("layer_types")
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window", False) else None
    if types is None:
        first = config.get("max_window_layers", 28)
        types = [_SLIDING if window is not None and layer >= first else _FULL for layer in range(num_layers)]
    others = sorted({str(one) for one in types} - {_FULL, _SLIDING})
    if others:
        return [f"layer_types: {', '.join(others)} is not supported, only {_FULL}, {_SLIDING}"]
    if len(types) != num_layers:
        return [f"layer_types: {len(types)} of them for {num_layers} layers; give each layer one"]
    if window is None and _SLIDING in types:
        return [f"layer_types: {_SLIDING} is not supported without use_sliding_window and sliding_window"]
    put_windows(fields, window, [one == _SLIDING for one in types])
    return []


def write_layer_windows(model: ModelConfig) -> dict[str, Any]:
    """Return the keys of `read_layer_windows`; older readers know `max_window_layers` alone."""
    windows = layer_windows(model)
    types = [_FULL if window is None else _SLIDING for window in windows]
    if model.window_size is None:
        return {"use_sliding_window": False, "layer_types": types}
    return {
        "use_sliding_window": True,
        "sliding_window": model.window_size,
        "max_window_layers": types.index(_SLIDING),
        "layer_types": types,
    }


def put_windows(fields: dict[str, Any], window: int | None, pattern: list[bool]) -> None:
    """Set the `fields` of `model` unless the window hides nothing in any sequence that the model is for."""
    if window is not None and window < fields["max_position_embeddings"] and any(pattern):
        fields["window_size"] = window
        if not all(pattern):
            fields["window_pattern"] = tuple(pattern)
