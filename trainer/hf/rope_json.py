"""Rotary position embedding in `config.json` -> our `model.rope`, and back. Torch-free.

transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 both in one `rope_parameters`; either is read, and
what was read is written the same way: word for word where the run changed nothing of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from configs.sections.model import ModelConfig, RopeConfig
from trainer.hf.families import Family

_KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor", "beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim", "attention_factor",
        "original_max_position_embeddings",
    ),
}  # fmt: skip
_NEEDED = {"yarn": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
_ORIGINAL = "original_max_position_embeddings"
# The keys of `config.json` that are read here.
ROPE_KEYS = frozenset(f"rope_parameters rope_scaling rope_theta partial_rotary_factor {_ORIGINAL}".split())
# What transformers reads for one rope_type or another, beside its name and the base; it knows no further keys, and
# neither do we.
_OF_SOME_TYPE = {key for keys in _KEYS.values() for key in keys} | {"short_factor", "long_factor"}


def read_rope(config: Mapping[str, Any], family: Family, context: Any) -> tuple[dict[str, Any], list[str]]:
    """Return the fields of `model.rope`, and one sentence for everything that cannot be expressed.

    `context` is the `max_position_embeddings` that the config says or implies.
    """
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
        if key in _OF_SOME_TYPE.difference(_KEYS[kind])
        and value is not None
        and not (kind == "dynamic" and key == _ORIGINAL and value == context)
    ]
    if kind == "default":
        return rope, problems
    rope |= {"scaling": kind} | {key: given[key] for key in _KEYS[kind] if given.get(key) is not None}
    needed = _NEEDED.get(kind, ("factor",))
    problems += [f"rope_parameters.{key}: missing with rope_type {kind}" for key in needed if key not in rope]
    if kind == "dynamic":  # transformers stretches what goes beyond max_position_embeddings, the original length
        rope[_ORIGINAL] = context
    if kind in ("llama3", "yarn"):
        problems += _read_original(config, rope, context)
    if kind == "yarn":
        problems += _read_yarn(given, rope, has_latent=_has_latent(family))
    return rope, problems


def longest_context(rope: Mapping[str, Any], context: Any) -> Any:
    """Return the longest sequence that a model is meant for, of which `config.json` says `context`.

    With dynamic scaling that is the original length, to be stretched by the factor.
    """
    factor = rope.get("factor")
    if rope.get("scaling") != "dynamic" or not isinstance(factor, int | float) or not isinstance(context, int):
        return context
    longest = factor * context
    return int(longest) if math.isfinite(longest) and longest > 0 else context


def write_rope(model: ModelConfig, carried: Mapping[str, Any] | None, family: Family) -> dict[str, Any]:
    """Return the keys of `config.json` that say `model.rope` and the context, in the style of the `carried` one."""
    rope = model.rope
    context = rope.original_max_position_embeddings if rope.scaling == "dynamic" else model.max_position_embeddings
    stated = {"max_position_embeddings": context}
    if carried is not None and _says(carried, rope, family, context):
        return stated | {key: carried[key] for key in ROPE_KEYS if key in carried}
    kind = "default" if rope.scaling == "none" else rope.scaling
    parameters: dict[str, Any] = {"rope_type": kind}
    parameters |= {key: getattr(rope, key) for key in _KEYS[kind]}
    if kind == "yarn":
        for key in _unsaid_of_yarn(rope):
            del parameters[key]
    if carried is not None and carried.get(_ORIGINAL) is not None and _ORIGINAL in parameters:
        stated[_ORIGINAL] = parameters[_ORIGINAL]
        if _ORIGINAL not in (carried.get("rope_parameters") or carried.get("rope_scaling") or {}):
            del parameters[_ORIGINAL]
    if carried is not None and "rope_parameters" not in carried:
        scaling = None if kind == "default" else _in_style(parameters, carried)
        return stated | {"rope_theta": rope.base, "rope_scaling": scaling}
    beside = {"rope_theta": rope.base} if carried is not None and "rope_theta" in carried else {}
    return stated | beside | {"rope_parameters": {"rope_theta": rope.base, **parameters}}


def _read_original(config: Mapping[str, Any], rope: dict[str, Any], context: Any) -> list[str]:
    """Read the original length from beside the other keys of llama3 and yarn; by default it is the context."""
    outside = config.get(_ORIGINAL)
    inside = rope.setdefault(_ORIGINAL, context if outside is None else outside)
    if outside in (None, inside):
        return []
    return [f"{_ORIGINAL}: {outside!r} beside {inside!r} in rope_parameters; keep one"]


def _read_yarn(given: Mapping[str, Any], rope: dict[str, Any], *, has_latent: bool) -> list[str]:
    """Read what `_compute_yarn_parameters` and DeepSeek's attention make of the factors on attention."""
    rope["truncate"] = bool(given.get("truncate", True))  # null is false there
    if "attention_factor" in rope:
        rope.pop("mscale", None)
        if not has_latent:
            rope.pop("mscale_all_dim", None)
        return []
    problems = []
    if not (rope.get("mscale") and rope.get("mscale_all_dim")):
        if rope.get("mscale_all_dim"):
            problems.append("rope_parameters.mscale: missing beside mscale_all_dim")
        rope |= {"mscale": 1.0, "mscale_all_dim": 0.0}  # transformers heeds the two together or not at all
    return problems


def _unsaid_of_yarn(rope: RopeConfig) -> set[str]:
    """Return the keys that say nothing, of which transformers warns or which older versions do not know."""
    unsaid = {"truncate"} if rope.truncate else set()
    if rope.attention_factor is None:
        unsaid.add("attention_factor")
    if rope.attention_factor is not None or not rope.mscale_all_dim:
        unsaid.add("mscale")
    return unsaid if rope.mscale_all_dim else unsaid | {"mscale_all_dim"}


def _says(carried: Mapping[str, Any], rope: RopeConfig, family: Family, context: int) -> bool:
    """Return whether a carried config says this rotation for this context."""
    fields, problems = read_rope(carried, family, context)
    return not problems and RopeConfig.model_validate(fields) == rope


def _in_style(parameters: dict[str, Any], carried: Mapping[str, Any]) -> dict[str, Any]:
    """Call the kind `type` where the carried config does, as the configs of DeepSeek and older models do."""
    before = carried.get("rope_scaling") or {}
    if "type" in before and "rope_type" not in before:
        parameters = {"type": parameters.pop("rope_type"), **parameters}
    return parameters


def _has_latent(family: Family) -> bool:
    return any(option.field.startswith("mla.") for option in family.options)
