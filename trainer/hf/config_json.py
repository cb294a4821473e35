"""`config.json` of a Hugging Face model -> our `model` section, and back, by the family's table. Torch-free.

A key with which transformers' model of the family computes is a field of ours or refused by name; what it does not read
changes nothing and is left aside (`trainer.hf.other_keys`).
What is written is read back and compared, so that a model which the family cannot express is refused too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from configs.errors import BadInput
from configs.fields import location_text
from configs.paths import find_special_file
from configs.plan.derive import head_dim, layer_windows, num_query_groups
from configs.roles import HeadKind
from configs.rules.model import check_model
from configs.sections.model import ModelConfig
from trainer.checkpoint.layout import resolve_checkpoint
from trainer.hf.directories import find_model_directory
from trainer.hf.families import FAMILIES, Family, choose_family
from trainer.hf.other_keys import check_other_keys, keys_left_aside
from trainer.hf.quantisation import QUANTISATION_KEY, read_block_size
from trainer.hf.rope_json import ROPE_KEYS, longest_context, read_rope, write_rope

# Further names of the longest sequence, which nothing computes with.
_LIMITS = ("model_max_length", "max_sequence_length")
_CLASSIFIER = "ForSequenceClassification"
# What shapes training alone: a checkpoint says the same whatever these are.
_TRAINING_ONLY = {"vocab_pad_multiple", "init_std", "hidden_dropout", "attention_dropout"}
_TRAINING_ONLY_MOE = {"aux_loss_coeff", "z_loss_coeff", "bias_update_rate"}


def load_config_json(directory: Path) -> dict[str, Any]:
    """Read `config.json`. Raises BadInput if it is missing or unreadable."""
    path = directory / "config.json"
    special = find_special_file(str(path))
    if special is not None:  # reading it would wait for ever, or take what another rank needs
        raise BadInput(f"{path}: is {special}, not a file; give the directory of a Hugging Face model.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path}: cannot be read ({error}); give the directory of a Hugging Face model.") from error
    if not isinstance(content, dict):
        raise BadInput(f"{path}: holds no mapping; give the directory of a Hugging Face model.")
    return content


def find_family(config: Mapping[str, Any], where: object) -> Family:
    """Return the table that `architectures` names. Raises BadInput for one that is unknown."""
    architectures = config.get("architectures") or []
    for name in architectures if isinstance(architectures, list) else []:
        kind = str(name).removesuffix("Model").removesuffix(_CLASSIFIER)  # LlamaModel: without an output layer
        for full in (name, f"{kind}ForCausalLM"):
            if isinstance(full, str) and full in FAMILIES:
                return FAMILIES[full]
    raise BadInput(
        f"{where}: architectures {architectures} cannot be converted; those that can: {', '.join(sorted(FAMILIES))}, "
        f"and reward models of these (...{_CLASSIFIER} with one label)."
    )


def read_head(config: Mapping[str, Any], where: object) -> HeadKind:
    """Return the head that `architectures` names. Raises BadInput for a classifier that gives no single value."""
    architectures = config.get("architectures") or []
    if not (isinstance(architectures, list) and any(str(name).endswith(_CLASSIFIER) for name in architectures)):
        return "vocabulary"
    labels = config.get("id2label")
    num_labels = len(labels) if isinstance(labels, dict) else config.get("num_labels", 2)  # as transformers
    if num_labels != 1:
        raise BadInput(
            f"{where}: {architectures[0]} tells {num_labels} labels apart, and a reward model gives one value; the "
            "only num_labels that can be converted: 1."
        )
    return "scalar"


def read_model(config: Mapping[str, Any], where: object = "config.json") -> ModelConfig:
    """Return the `model` section that means the same. Raises BadInput with every key that cannot be expressed."""
    try:
        return _read_model(config, where)
    except (TypeError, AttributeError, KeyError) as error:
        raise BadInput(f"{where}: holds a value of the wrong kind ({error}); use the one of the weights.") from error


def _read_model(config: Mapping[str, Any], where: object) -> ModelConfig:
    family = find_family(config, where)
    config, problems = _by_one_name(config, family)
    fields: dict[str, Any] = {}
    for option in family.options:
        value = config.get(option.key, option.default)
        if value is None and option.is_required:
            problems.append(f"{option.key}: missing")
        elif value is not None:
            _put(fields, option.field, value)
    for only in family.only:
        value = config.get(only.key, only.default)
        if value not in only.values and not (isinstance(value, float) and math.isclose(value, only.values[0])):
            problems.append(f"{only.key}: {value!r} is not supported, only {', '.join(map(repr, only.values))}")
    problems += check_other_keys(config, family.handled)
    problems += read_block_size(config)[1]
    rope, rope_problems = read_rope(config, family, fields.get("max_position_embeddings"))
    problems += rope_problems
    fields["max_position_embeddings"] = longest_context(rope, fields.get("max_position_embeddings"))
    if not problems:
        problems += family.read(config, fields)
    types = (family.model_type, *family.further_types)
    if config.get("model_type", types[0]) not in types:
        problems.append(f"model_type: {config['model_type']!r} is not supported, only {', '.join(map(repr, types))}")
    if problems:
        raise BadInput(f"{where}: {family.architecture} with these cannot be converted: {'; '.join(problems)}.")
    return _validated(fields | {"rope": rope}, where)


def left_aside(config: Mapping[str, Any]) -> list[str]:
    """Return the keys that change nothing, but are not commonly known to: worth a word to the user."""
    family = find_family(config, "config.json")
    return keys_left_aside(config, family.handled | ROPE_KEYS | {QUANTISATION_KEY})


def _by_one_name(config: Mapping[str, Any], family: Family) -> tuple[dict[str, Any], list[str]]:
    """Return the config with the family's own names of keys, and a sentence for each that has two values."""
    named, problems = dict(config), []
    for alias, key in family.aliases.items():
        value = named.pop(alias, None)
        if value is not None and named.setdefault(key, value) != value:
            problems.append(f"{alias}: {value!r} beside {key} {named[key]!r}, which is the same; keep one")
    return named, problems


def architecture_of(family: Family, head: HeadKind) -> str:
    """Return the class of `transformers` that a model of a family with that head is."""
    name = family.architecture
    return name if head == "vocabulary" else name.removesuffix("ForCausalLM") + _CLASSIFIER


def write_model(
    model: ModelConfig, carried: Mapping[str, Any] | None = None, head: HeadKind = "vocabulary"
) -> dict[str, Any]:
    """Return the `config.json` of a model, over the one that was `carried` from its import, if there is one.

    With a scalar head it is a sequence classifier of one label.

    Raises BadInput naming each field of `model` that no family expresses.
    """
    family = choose_family(model) if carried is None else find_family(carried, "the imported config.json")
    if carried is not None:
        carried = _by_one_name(carried, family)[0]
        carried.pop(QUANTISATION_KEY, None)  # what is written is not quantised
    config: dict[str, Any] = {
        **(carried or {}),
        "architectures": [architecture_of(family, head)],
        "model_type": family.model_type,
    }
    config.pop("original_max_position_embeddings", None)  # it is written with the rotation, where that has one
    if head == "scalar":
        config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    if carried is None:
        config |= {only.key: only.values[0] for only in family.only if only.values[0] is not None}
    for option in family.options:
        value = _get(model, option.field)
        if value is None and (carried is None or option.key in carried):
            value = _derived(model, option.field)
        if value is not None:
            config[option.key] = value
    config |= family.write(model)
    config |= write_rope(model, carried, family)
    if has_other_context(model, carried):
        config |= {key: model.max_position_embeddings for key in _LIMITS if key in config}
    _check_expressed(model, config, family)
    return config


def has_other_context(model: ModelConfig, carried: Mapping[str, Any] | None) -> bool:
    """Return whether a model is meant for sequences of another length than the one it was imported as, if it was."""
    return carried is None or read_model(carried).max_position_embeddings != model.max_position_embeddings


def compare_models(ours: ModelConfig, theirs: ModelConfig) -> list[str]:
    """Return the fields in which two architectures differ, as `field: ours, not theirs`."""
    left, right = _inference_fields(ours), _inference_fields(theirs)
    return [
        f"model.{name}: {left.get(name)!r}, not {right.get(name)!r}"
        for name in sorted(left.keys() | right.keys())
        if left.get(name) != right.get(name)
    ]


def check_same_architecture(model: ModelConfig, directory: Path, free: Collection[str]) -> ModelConfig:
    """Return the model in `directory`. Raises BadInput with every field in which a run's is another, but the `free`."""
    if resolve_checkpoint(directory) is not None:
        raise BadInput(f"checkpoint.init_from_hf: {directory} is a checkpoint; name it as checkpoint.init_from.")
    directory = find_model_directory(directory)
    theirs = read_model(load_config_json(directory), directory / "config.json")
    ignored = tuple(f"model.{name}" for name in free)
    differences = [line for line in compare_models(model, theirs) if not line.startswith(ignored)]
    if differences:
        raise BadInput(
            f"checkpoint.init_from_hf: {directory} is another architecture ({'; '.join(differences)}); "
            f"python tools/convert_hf.py model {directory} prints the section that fits."
        )
    return theirs


def _check_expressed(model: ModelConfig, config: Mapping[str, Any], family: Family) -> None:
    differences = compare_models(model, read_model(config, f"the config.json of {family.architecture}"))
    if differences:
        raise BadInput(
            f"{family.architecture}: cannot express {'; '.join(differences)}; no Hugging Face family of ours fits "
            "this model exactly."
        )


def _inference_fields(model: ModelConfig) -> dict[str, Any]:
    """Return what a checkpoint's meaning depends on, flat, with defaults written out."""
    flat: dict[str, Any] = {}
    for name, value in model.model_dump().items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": item for key, item in value.items()}
        else:
            flat[name] = value
    for name in _TRAINING_ONLY | {f"moe.{field}" for field in _TRAINING_ONLY_MOE}:
        flat.pop(name, None)
    flat["num_query_groups"] = num_query_groups(model)
    flat["window_pattern"] = [window is not None for window in layer_windows(model)]
    flat["head_dim"] = head_dim(model) if model.mla is None else None
    if model.rope.scaling == "dynamic":
        flat.pop("max_position_embeddings")  # config.json says the original length in its place
    if model.mla is not None:
        flat["mla.norm_eps"] = model.mla.norm_eps or model.norm_eps
    if model.moe is not None:
        flat["moe.balancing"] = model.moe.balancing == "bias"
        flat["moe.scaling_factor"] = model.moe.scaling_factor or 1.0
        if model.moe.num_dense_layers == 0:
            flat.pop("ffn_hidden_size")  # of no layer
    return flat


def _validated(fields: dict[str, Any], where: object) -> ModelConfig:
    try:
        model = ModelConfig.model_validate(fields, strict=True)
    except ValidationError as error:
        wrong = [f"model.{location_text(one['loc'])} {one['input']!r} ({one['msg'].lower()})" for one in error.errors()]
        raise BadInput(f"{where}: gives {'; '.join(wrong)}; use the config.json of these weights.") from error
    problems = check_model(model)
    if problems:
        raise BadInput(f"{where}: {'. '.join(problems)}.")
    return model


def _derived(model: ModelConfig, field: str) -> int | None:
    """Return what follows from the other fields where one is not given; a family's own default may be another."""
    if model.mla is not None:
        return None
    return {"num_query_groups": num_query_groups, "head_dim": head_dim}.get(field, lambda model: None)(model)


def _put(fields: dict[str, Any], path: str, value: Any) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        fields = fields.setdefault(parent, {})
    fields[name] = value


def _get(model: Any, path: str) -> Any:
    for name in path.split("."):
        model = getattr(model, name)
        if model is None:
            return None
    return model
