"""Where a tensor of the model lies in a Megatron-Core checkpoint. Torch-free; knows no files.

A name says layer and expert by number: `decoder.layers.3.mlp.experts.experts.7.linear_fc1.weight`. In a checkpoint,
layers that are all alike share one key and lie along a first axis, `decoder.layers.self_attention...[3]`, and experts
along the axis after it; else the number stays in the key.
"""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from dataclasses import dataclass

from configs.errors import BadInput
from configs.sections.model import ModelConfig

_LAYER = re.compile(r"^(decoder\.layers\.)(\d+)\.")
_EXPERT = re.compile(r"(\.experts\.experts\.)(\d+)\.")
_LAYER_AXIS = re.compile(r"^decoder\.layers\.(?!\d)")
_EXPERT_AXIS = re.compile(r"\.experts\.experts\.(?!\d)")
# Megatron-LM's local layers name the norm before experts as if it were fused into a dense MLP.
_OTHER_SPELLING = (".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")


@dataclass(frozen=True)
class Place:
    """A key of the checkpoint, and the place along the axes in front of the tensor's own."""

    key: str
    index: tuple[int, ...] = ()


def find_place(name: str, keys: Container[str]) -> Place | None:
    """Return where `name` lies among the `keys` of a checkpoint, whichever way it was written; None if nowhere."""
    for spelling in (name, name.replace(*_OTHER_SPELLING)):
        for has_layer_axis in (True, False):
            for has_expert_axis in (True, False):
                place = _place(spelling, has_layer_axis=has_layer_axis, has_expert_axis=has_expert_axis)
                if place.key in keys:
                    return place
    return None


def choose_place(name: str, model: ModelConfig) -> tuple[Place, tuple[int, ...]]:
    """Return where the engine looks for `name`, and the sizes of the axes in front."""
    place = _place(name, has_layer_axis=model.moe is None, has_expert_axis=True)
    sizes: tuple[int, ...] = ()
    if model.moe is None and _LAYER.match(name):
        sizes += (model.num_layers,)
    if model.moe is not None and _EXPERT.search(name):
        sizes += (model.moe.num_experts,)
    return place, sizes


def name_at(key: str, index: Sequence[int]) -> str:
    """Return the name of the tensor at a place: the inverse of the two above."""
    rest = list(index)
    name = key
    if _LAYER_AXIS.match(key) and rest:
        name = name.replace("decoder.layers.", f"decoder.layers.{rest.pop(0)}.", 1)
    if _EXPERT_AXIS.search(key) and rest:
        name = name.replace(".experts.experts.", f".experts.experts.{rest.pop(0)}.", 1)
    if rest:
        raise BadInput(f"tensor {key}: its axes {tuple(index)} are neither layers nor experts; it cannot be converted.")
    return name


def _place(name: str, *, has_layer_axis: bool, has_expert_axis: bool) -> Place:
    key, index = name, []
    for pattern, is_axis in ((_LAYER, has_layer_axis), (_EXPERT, has_expert_axis)):
        found = pattern.search(key)
        if found and is_axis:
            index.append(int(found.group(2)))
            key = pattern.sub(r"\1", key, count=1)
    return Place(key, tuple(index))
