"""The models beside the policy: what lies in the places that the config names, whether it fits the run, and loading it.

Torch-free but for building and loading.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import BadInput
from configs.fp8 import uses_te_layers
from configs.plan.derive import padded_vocab_size
from configs.roles import POLICY, HeadKind, SecondModel
from configs.rules.fp8 import check_fp8
from configs.rules.layout import check_layout
from configs.sections.model import ModelConfig
from configs.stages import Config
from parallel.platform import PlatformName, has_transformer_engine
from trainer.checkpoint.base_weights import BaseWeights, identify_base
from trainer.checkpoint.layout import resolve_checkpoint
from trainer.checkpoint.manifest import (
    FREE_WARM_START_FIELDS,
    Manifest,
    another_run,
    check_head,
    read_manifest,
)
from trainer.data.chat.template import load_template
from trainer.data.tokenizer import Tokenizer, load_tokenizer
from trainer.hf.companions import carried_folder
from trainer.hf.config_json import load_config_json, read_head, read_model
from trainer.hf.directories import find_model_directory

if TYPE_CHECKING:
    from trainer.engine.build import ModelPlan
    from trainer.engine.sharded_model import ShardedModel

log = logging.getLogger(__name__)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class _Place:
    """What lies at a place."""

    directory: Path
    model: ModelConfig
    tokenizer: Path | None
    """Directory of the tokenizer it was trained with, where that is known."""
    template: str | None = None
    """The chat template that its run named; None for its tokenizer's own, or none."""
    head: HeadKind = "vocabulary"
    is_critic: bool = False
    """Whether it is the critic of a checkpoint of PPO, not the policy."""
    policy: ModelConfig | None = None
    """Of that checkpoint, beside its critic."""


@dataclass(frozen=True)
class FoundModel:
    """A model beside the policy, found to fit the run."""

    second: SecondModel
    config: Config
    """The run's, with this model's architecture and, where it is trained, its optimizer."""
    start: str | None
    """The checkpoint or the Hugging Face model to load; None where the checkpoint that is resumed holds it."""
    record: Mapping[str, Any]
    """What checkpoints keep of it: the place by name and as found, its fingerprint, the architecture."""
    is_start_critic: bool = False
    """Whether it starts from the critic of that checkpoint."""


def find_second_models(
    config: Config, world_size: int, platform: PlatformName, resume_from: Path | None = None
) -> dict[str, FoundModel]:
    """Return the models beside the policy by role.

    Where a checkpoint is resumed, it holds those that are trained, and the others must be what they were. Raises
    BadInput, naming the field, for a place that holds no model, another vocabulary or tokenizer, a size that the layout
    does not divide, and another model than that of the checkpoint.
    """
    if not config.second_models:
        return {}
    saved = None if resume_from is None else read_manifest(resume_from).models or {}
    found = {}
    for role, second in config.second_models.items():
        if saved is not None and role not in saved:
            raise BadInput(
                f"{second.field}: {resume_from} was saved by a run without it; {another_run(config)} (with "
                f"checkpoint.init_from={resume_from} from its weights)."
            )
        found[role] = find_second_model(second, config, world_size, platform, None if saved is None else saved[role])
    return found


def find_second_model(
    second: SecondModel,
    config: Config,
    world_size: int,
    platform: PlatformName,
    record: Mapping[str, Any] | None = None,
) -> FoundModel:
    """Return what lies at a place, or what the `record` of a checkpoint says; refused as by `find_second_models`."""
    try:
        found = _fresh(second, config) if record is None else _resumed(second, config, record)
    except BadInput as error:
        text = str(error)
        raise BadInput(text if text.startswith(second.field) else f"{second.field}: {text}") from error
    _check_fits(found, world_size, platform)
    return found


def look_at(second: SecondModel, config: Config) -> Config:
    """Return the run's config for the model at a place, on whatever layout. Raises BadInput where there is none."""
    try:
        return _own_config(second, config, _look_for(second, config).model)
    except BadInput as error:
        raise BadInput(f"{second.field}: {error}") from error


def plan_models(config: Config, found: Mapping[str, FoundModel]) -> dict[str, ModelPlan]:
    """Return the plans of the policy, which is trained, and of the models beside it."""
    from trainer.engine.build import ModelPlan

    plans = {POLICY: ModelPlan(config, is_trained=True, head=config.head)}
    for role, one in found.items():
        second = one.second
        num_ids = one.record["model"]["vocab_size"]
        plans[role] = ModelPlan(one.config, second.is_trained, second.head, one.start, one.is_start_critic, num_ids)
    return plans


def load_second_models(models: Mapping[str, ShardedModel], plans: Mapping[str, ModelPlan]) -> None:
    """Load the models that have a place to start from. Collective: all ranks of the world must call this."""
    from trainer.run.weights import load_weights

    for role, plan in plans.items():
        if plan.start is not None:
            load_weights(models[role], plan.start, is_of_critic=plan.is_start_critic, num_ids=plan.num_start_ids)
            kind = "trained from" if plan.is_trained else "frozen, of"
            kind += " the critic in" if plan.is_start_critic else ""
            log.info("%s: %d layers of width %d, %s %s", role, *_size(plan.config.model), kind, plan.start)


def _size(model: ModelConfig) -> tuple[int, int]:
    return model.num_layers, model.hidden_size


def _fresh(second: SecondModel, config: Config) -> FoundModel:
    """Return what lies at the place."""
    found = _look_for(second, config)
    place, model = found.directory, found.model
    check_head(found.head, second.head, place, may_be_new=second.is_trained)
    _check_vocabulary(second, found, config)
    if not second.is_trained and second.head == "scalar":
        _compare_templates(second, found, config)
    source = identify_base(place)
    record = {"named": second.place, **source.as_dict(), "model": model.model_dump(mode="json")}
    return FoundModel(second, _own_config(second, config, model), source.path, record, found.is_critic)


def _resumed(second: SecondModel, config: Config, record: Mapping[str, Any]) -> FoundModel:
    """Return the model that a checkpoint was saved with. Raises BadInput where it is no longer there, or another."""
    model = ModelConfig.model_validate(record["model"])
    own = _own_config(second, config, model)
    if second.is_trained:
        return FoundModel(second, own, None, record)
    path = record["path"]
    if second.place != record["named"] or not Path(path).is_dir():
        path = str(_look(second).directory)
    source: BaseWeights = identify_base(Path(path))
    if source.fingerprint != record["fingerprint"]:
        raise BadInput(
            f"{path} is another model than the one of the checkpoint that is resumed, which was in {record['path']}; "
            f"name the place of that, or {another_run(config)}."
        )
    return FoundModel(second, own, source.path, record)


def _own_config(second: SecondModel, config: Config, model: ModelConfig) -> Config:
    """Return the run's config for another model; the padding of its vocabulary is layout, and so the run's.

    A teacher's logits are compared id by id: of its ids it is given those that the policy has, and no more. An id that
    the policy has and the model has not is a row of zeros. Where the model has no experts, ranks that the run's experts
    are spread over are data-parallel ones to it.
    """
    ours = config.model
    vocabulary = {"vocab_pad_multiple": ours.vocab_pad_multiple}
    if model.vocab_size < ours.vocab_size or (second.head == "vocabulary" and model.vocab_size > ours.vocab_size):
        num_ids = min(model.vocab_size, ours.vocab_size)
        vocabulary = {"vocab_pad_multiple": padded_vocab_size(ours), "vocab_size": num_ids}
    model = model.model_copy(update=vocabulary)
    experts = {"ep": 1, "etp": None} if model.moe is None else {}
    return config.model_copy(
        update={
            "model": model,
            "parallel": config.parallel.model_copy(update=experts),
            "lora": None,
            "optimizer": second.optimizer or config.optimizer,
        }
    )


def _look_for(second: SecondModel, config: Config) -> _Place:
    """Return what lies at a place; one that begins as the policy does is used as the policy is. Raises BadInput."""
    found = _look(second)
    if not second.is_start:
        return found
    before = found.policy or found.model
    ours = {name: getattr(config.model, name) for name in FREE_WARM_START_FIELDS}
    used = {name: value for name, value in ours.items() if value != getattr(before, name)}
    return replace(found, model=found.model.model_copy(update=used))


def _look(second: SecondModel) -> _Place:
    """Return what lies at a place, of a run of PPO for a critic its critic. Raises BadInput where there is no model."""
    text = second.place
    checkpoint = resolve_checkpoint(text)
    if checkpoint is not None:
        manifest = read_manifest(checkpoint)
        critic = manifest.of_critic() if second.is_trained else None
        chosen, tokenizer = critic or manifest, _saved_tokenizer(manifest, checkpoint)
        model = ModelConfig.model_validate(chosen.config["model"])
        policy = None if critic is None else ModelConfig.model_validate(manifest.config["model"])
        return _Place(checkpoint, model, tokenizer, manifest.template, chosen.head, critic is not None, policy)
    place = Path(text)
    directory = find_model_directory(place) if place.is_dir() else place
    if not (directory / "config.json").is_file() or not any(directory.glob("*.safetensors")):
        raise BadInput(
            f"{text} holds no complete checkpoint and no Hugging Face model; name one like "
            "runs/<name>/checkpoints/latest, or the directory of a Hugging Face model (hf download ID --local-dir DIR)."
        )
    content, path = load_config_json(directory), directory / "config.json"
    tokenizer = directory if _has_tokenizer(directory) else None
    return _Place(directory, read_model(content, path), tokenizer, head=read_head(content, path))


def _saved_tokenizer(manifest: Manifest, checkpoint: Path) -> Path | None:
    """Return the directory of the tokenizer that a checkpoint's run had, or of the one that the run carried."""
    named, carried = manifest.config["data"]["tokenizer"], carried_folder(checkpoint.parent.parent)
    for place in (None if named is None else Path(named), carried):
        if place is not None and _has_tokenizer(place):
            return place
    return None


def _has_tokenizer(directory: Path) -> bool:
    return any((directory / name).is_file() for name in _TOKENIZER_FILES)


def _check_vocabulary(second: SecondModel, found: _Place, config: Config) -> None:
    """Raise BadInput where the tokens of a model are not those that the run makes.

    Where the tokenizers are known to be one, a model may have other rows beyond its tokens: published models of one
    family are padded to different sizes.
    """
    place, ours = found.directory, _run_tokenizer(config)
    theirs = None if ours is None or found.tokenizer is None else load_tokenizer(found.tokenizer)
    if theirs is None and ours is not None:
        log.info("%s: which tokenizer it was trained with is not known; it is taken to be data.tokenizer", place)
    size = found.model.vocab_size
    is_padding = ours is not None and theirs is not None and size >= theirs.vocab_size
    if size != config.model.vocab_size and not is_padding:
        raise BadInput(
            f"{place} has a vocabulary of {size} and the policy one of {config.model.vocab_size} "
            "(model.vocab_size); name a model of the same, or one that is known to have the tokenizer data.tokenizer."
        )
    if theirs is not None and ours is not None and theirs.vocabulary_hash != ours.vocabulary_hash:
        raise BadInput(
            f"{place} was trained with the tokenizer in {found.tokenizer}, whose vocabulary is not that of "
            f"data.tokenizer {config.data.tokenizer}; name a model of the same tokenizer."
        )


def _run_tokenizer(config: Config) -> Tokenizer | None:
    """Return the tokenizer of the run, where that is here."""
    named = config.data.tokenizer
    return None if named is None or not Path(named).is_dir() else load_tokenizer(named)


def _compare_templates(second: SecondModel, found: _Place, config: Config) -> None:
    """Warn where answers are rendered otherwise than those that a reward model learned to score."""
    if config.chat_template is None or config.data.tokenizer is None or found.tokenizer is None:
        return
    field, ours = config.chat_template
    try:
        there, here = load_template(found.template, found.tokenizer), load_template(ours, config.data.tokenizer)
    except BadInput:
        return  # of ours it is said where it is needed; theirs is not known
    if there.text != here.text:
        log.warning(
            "%s: %s learned to score answers in the chat template %s, and is shown them in %s (%s): what it says of "
            "those may mean little",
            second.field, found.directory, there.name, here.name, field,
        )  # fmt: skip


def _check_fits(found: FoundModel, world_size: int, platform: PlatformName) -> None:
    """Raise BadInput with a sentence for each rule of the layout that the model breaks."""
    has_te = uses_te_layers(found.config, has_te=has_transformer_engine())
    problems = [
        *check_layout(found.config, world_size, platform=platform, has_te=has_te),
        *check_fp8(found.config),
    ]
    if problems:
        raise BadInput("\n".join(f"{found.second.field}: {found.second.place}: {problem}" for problem in problems))
