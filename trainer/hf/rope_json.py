"""Rotary position embedding in `config.json` -> our `model.rope`, and back. Torch-free.

transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 both in one `rope_parameters`; either is read, and
what was read is written the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from configs.sections.model import ModelConfig
from trainer.hf.families import Family

_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "original_max_position_embeddings",
    ),
}  # fmt: skip
# The keys of `config.json` that are read here.
ROPE_KEYS = frozenset(
    "rope_parameters rope_scaling rope_theta partial_rotary_factor original_max_position_embeddings".split()
)
# Further keys inside: those that say nothing new, or the only thing that the engine does.
_EXPECTED = {"rope_type": None, "type": None, "rope_theta": None, "attention_factor": (None,), "truncate": (None, True)}


# What transformers reads for one rope_type or another; it knows no further keys, and neither do we.
_OF_SOME_TYPE = {*_EXPECTED, *(key for keys in _KEYS.values() for key in keys)} | {
    "partial_rotary_factor", "short_factor", "long_factor", "original_max_position_embeddings",
}  # fmt: skip


def read_rope(config: Mapping[str, Any], family: Family) -> tuple[dict[str, Any], list[str]]:
    """Return the fields of `model.rope`, and one sentence for everything that cannot be expressed."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if config.get("rope_parameters") and config.get("rope_scaling"):
        return {}, ["rope_parameters, rope_scaling: both given, of which transformers heeds one; keep that"]
    if not isinstance(given, Mapping) or any(isinstance(value, Mapping) for value in given.values()):
        return {}, [f"rope_parameters: {given!r} is not one set of parameters for all layers"]
    kind = given.get("rope_type", given.get("type", "default")) or "default"
    base = given.get("rope_theta", config.get("rope_theta", family.rope_theta))
    rope: dict[str, Any] = {"base": base, "interleaved": family.is_rope_interleaved}
    fraction = given.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if fraction not in (None, 1.0):
        return {}, [f"partial_rotary_factor: {fraction} is not supported, only 1.0"]
    if base != config.get("rope_theta", base):
        return {}, [f"rope_theta: {config['rope_theta']!r} beside {base!r} in rope_parameters; keep one"]
    if not isinstance(kind, str) or kind not in _KEYS:
        return {}, [f"rope_parameters: rope_type {kind!r} is not supported, only {', '.join(_KEYS)}"]
    problems = [
        f"rope_parameters.{key}: {value!r} is not understood with rope_type {kind}"
        for key, value in given.items()
        if key in _OF_SOME_TYPE - {*_KEYS[kind], "partial_rotary_factor"} and not _is_expected(key, value)
    ]
    outside = config.get("original_max_position_embeddings")
    if outside is not None and kind in ("llama3", "yarn") and outside != given.get("original_max_position_embeddings"):
        problems.append(
            f"original_max_position_embeddings: {outside!r} outside of the other keys of {kind}; move it there"
        )
    if kind == "default":
        return rope, problems
    rope |= {"scaling": kind} | {key: given[key] for key in _KEYS[kind] if given.get(key) is not None}
    needed = _KEYS["llama3"] if kind == "llama3" else ("factor",)
    problems += [f"rope_parameters.{key}: missing with rope_type {kind}" for key in needed if key not in rope]
    if kind == "yarn":
        rope.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    if kind == "yarn" and not (rope.get("mscale") and rope.get("mscale_all_dim")):
        if rope.get("mscale_all_dim"):
            problems.append("rope_parameters.mscale: missing beside mscale_all_dim")
        rope |= {"mscale": 1.0, "mscale_all_dim": 0.0}  # transformers heeds the two together or not at all
    return rope, problems


def write_rope(model: ModelConfig, carried: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the keys of `config.json` that say `model.rope`, in the style of the `carried` one."""
    rope = model.rope
    kind = "default" if rope.scaling == "none" else rope.scaling
    parameters: dict[str, Any] = {"rope_type": kind}
    parameters |= {key: getattr(rope, key) for key in _KEYS[kind]}
    if kind == "yarn" and not rope.mscale_all_dim:
        del parameters["mscale"], parameters["mscale_all_dim"]
    if carried is not None and "rope_parameters" not in carried:
        return {"rope_theta": rope.base, "rope_scaling": None if kind == "default" else _in_style(parameters, carried)}
    beside = {"rope_theta": rope.base} if carried is not None and "rope_theta" in carried else {}
    return beside | {"rope_parameters": {"rope_theta": rope.base, **parameters}}


def _in_style(parameters: dict[str, Any], carried: Mapping[str, Any]) -> dict[str, Any]:
    """Call the kind `type` where the carried config does, as the configs of DeepSeek and older models do."""
    before = carried.get("rope_scaling") or {}
    if "type" in before and "rope_type" not in before:
        parameters = {"type": parameters.pop("rope_type"), **parameters}
    return parameters


def _is_expected(key: str, value: Any) -> bool:
    allowed = _EXPECTED.get(key, ())
    return allowed is None or value in allowed
