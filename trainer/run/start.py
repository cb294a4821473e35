"""Where a run begins: fresh, at a checkpoint, or with the weights of a checkpoint or of a Hugging Face model."""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import BadInput
from configs.fields import value_text
from configs.load import resolved_dict
from configs.plan.derive import head_dim
from configs.sections.model import ModelConfig
from configs.stages import Config
from trainer.checkpoint.base_weights import BaseWeights, identify_base, recorded_base
from trainer.checkpoint.layout import existing_checkpoint, latest_checkpoint
from trainer.checkpoint.manifest import (
    FREE_MODEL_FIELDS,
    FREE_WARM_START_FIELDS,
    IMPORT_STAGE,
    MANIFEST,
    Manifest,
    another_run,
    check_architecture,
    check_continues,
    check_head,
    read_manifest,
)
from trainer.hf.companions import carried_config, carried_folder
from trainer.hf.config_json import check_same_architecture, write_model
from trainer.hf.directories import find_model_directory
from trainer.hf.source import HfModel
from trainer.optim.learning_rate import compute_learning_rate
from trainer.run.second_models import look_at

log = logging.getLogger(__name__)
_VISIBLE_SECONDS = 120
_STEERING_SECTIONS = (
    "model", "precision", "data", "train", "optimizer", "schedule", "lora", "sft", "preference", "reward",
    "grpo", "ppo", "rollout", "online_dpo", "distill",
)  # fmt: skip
_QUIET_FIELDS = (
    "train.log_every", "data.prefetch_steps", "sft.cache", "sft.num_workers", "sft.num_answers",
    "sft.max_answer_tokens", "grpo.num_validation_prompts", "grpo.num_reward_workers", "rollout.max_rows",
    "rollout.cache_gib", "preference.cache", "preference.num_workers", "preference.num_answers",
    "preference.max_answer_tokens", "reward.cache", "reward.num_workers",
)  # fmt: skip


@dataclass(frozen=True)
class Start:
    """Where the run begins: at most one of the three paths is set."""

    resume_from: Path | None = None
    init_from: Path | None = None
    init_from_hf: Path | None = None
    base: BaseWeights | None = None
    """The frozen weights of a run that trains adapters."""
    changes: tuple[str, ...] = ()
    """What of the config steers training and is not what the checkpoint to resume from was written with; of a warm
    start, in what the model is used otherwise than its weights were trained."""

    def describe(self) -> str:
        """Return the start in words."""
        if self.resume_from is not None:
            return f"resuming from {self.resume_from}"
        weights = self.init_from or self.init_from_hf
        return f"starting with the weights of {weights}" if weights else "a fresh start"

    @property
    def carried(self) -> Path | None:
        """Directory with the `config.json` and companions of the Hugging Face model that the weights come from."""
        if self.init_from_hf is not None:
            return self.init_from_hf
        checkpoint = self.resume_from or self.init_from
        return carried_folder(checkpoint.parent.parent) if checkpoint is not None else None

    def wait_until_visible(self, seconds: float) -> None:
        """Wait until this rank sees what rank 0 chose: on file systems of a network that can take a while.

        Raises BadInput where it does not come.
        """
        chosen = self.resume_from or self.init_from
        file = chosen / MANIFEST if chosen is not None else self.init_from_hf and self.init_from_hf / "config.json"
        deadline = time.monotonic() + min(seconds, _VISIBLE_SECONDS)
        while file is not None and not file.is_file():
            if time.monotonic() > deadline:
                raise BadInput(
                    f"{file}: rank 0 reads it and {socket.gethostname()} does not see it; put it on a file system that "
                    "all hosts share."
                )
            time.sleep(0.2)


def check_places(config: Config) -> None:
    """Raise BadInput where a run that begins anew names a place that holds no model: before hours of tokenising.

    What lies there is looked into by `find_start` and `find_second_models`.
    """
    settings = config.checkpoint
    if settings.resume not in ("auto", "never"):
        existing_checkpoint(settings.resume, "checkpoint.resume")
        return
    if latest_checkpoint(str(config.run.dir)) is not None:
        return
    if settings.init_from is not None:
        existing_checkpoint(settings.init_from, "checkpoint.init_from")
    if settings.init_from_hf is not None:
        find_model_directory(Path(settings.init_from_hf))
    for second in config.second_models.values():
        look_at(second, config)
    if config.lora is not None and config.lora.init_from is not None and not os.path.isdir(config.lora.init_from):
        raise BadInput(f"lora.init_from: {config.lora.init_from} is no directory; name one that PEFT has saved.")


def find_start(config: Config, stage_name: str) -> Start:
    """Return where the run begins, after checking that it can, and that it can be exported. Raises BadInput.

    Rank 0 alone calls this, with the run directory locked: another run may have been about to finish a checkpoint.
    """
    start = _find(config, stage_name)
    if config.checkpoint.export_hf:
        write_model(config.model, carried_config(start.carried), config.head)
    return start


def _find(config: Config, stage_name: str) -> Start:
    settings, run_dir = config.checkpoint, config.run.dir
    assert run_dir is not None
    resume_from = latest_checkpoint(run_dir)
    if settings.resume == "never":
        if resume_from is not None:
            raise BadInput(
                f"checkpoint.resume: never, but {run_dir} holds checkpoints; {another_run(config)}, or "
                "checkpoint.resume=auto, which continues."
            )
    elif settings.resume != "auto":
        named = existing_checkpoint(settings.resume, "checkpoint.resume")
        if resume_from is not None and resume_from != named and _is_continuing(resume_from, config):
            log.info("checkpoint.resume: this very command has already gone back to %s; it continues from there", named)
        else:
            resume_from = named
    if resume_from is not None:
        manifest = read_manifest(resume_from)
        check_continues(manifest, config, stage_name, resume_from)
        base = _find_base(manifest, config, resume_from)
        return Start(resume_from=resume_from, base=base, changes=_all_changes(manifest, config))
    base = identify_base(_base_place(config)) if config.lora is not None else None
    if settings.init_from_hf is not None:
        theirs = check_same_architecture(config.model, Path(settings.init_from_hf), FREE_WARM_START_FIELDS)
        found = HfModel(settings.init_from_hf, config.model)  # refuses missing and damaged files
        check_head(found.head, config.head, found.directory, may_be_new=True)
        changes = describe_new_use(theirs, theirs.max_position_embeddings, config)
        return Start(init_from_hf=Path(settings.init_from_hf), base=base, changes=changes)
    if settings.init_from is None:
        return Start()
    init_from = existing_checkpoint(settings.init_from, "checkpoint.init_from")
    manifest = read_manifest(init_from)
    check_architecture(manifest, resolved_dict(config)["model"], init_from, is_warm_start=True)
    check_head(manifest.head, config.head, init_from, may_be_new=True)
    before = ModelConfig.model_validate(manifest.config["model"])
    is_imported = manifest.stage["name"] == IMPORT_STAGE
    trained_len = before.max_position_embeddings if is_imported else manifest.config["train"]["seq_len"]
    return Start(init_from=init_from, base=base, changes=describe_new_use(before, trained_len, config))


def _find_base(manifest: Manifest, config: Config, checkpoint: Path) -> BaseWeights | None:
    """Return the base of adapters: where they were trained beside it, or where the config says that it is now."""
    try:
        return recorded_base(manifest.base, checkpoint)
    except BadInput:
        if config.checkpoint.init_from is None and config.checkpoint.init_from_hf is None:
            raise
        return recorded_base(manifest.base, checkpoint, _base_place(config))


def _base_place(config: Config) -> Path:
    """Return the directory of the weights that the config names. Raises BadInput if it is none."""
    settings = config.checkpoint
    if settings.init_from_hf is not None:
        return find_model_directory(Path(settings.init_from_hf))
    assert settings.init_from is not None  # the config check asks for a base
    return existing_checkpoint(settings.init_from, "checkpoint.init_from")


def describe_new_use(before: ModelConfig, trained_len: int, config: Config) -> tuple[str, ...]:
    """Return in what a warm start uses the model otherwise than `before`, and whether it reaches beyond what it knows.

    `trained_len` is the longest sample in tokens that the weights were trained on.
    """
    seq_len, stretched = config.train.seq_len, set(FREE_WARM_START_FIELDS - FREE_MODEL_FIELDS)
    there, here = (model.model_dump(include=stretched) for model in (before, config.model))
    changes = describe_changes({"model": there}, {"model": here}, ("model",))
    if seq_len > trained_len and config.model.rope == before.rope:
        base = _stretched_base(before, seq_len / trained_len)
        changes.append(
            f"train.seq_len is {seq_len}, it was {trained_len}, and model.rope has met no positions beyond; a value to "
            f"try: model.rope.base={base:.0f}"
        )
    rope = config.model.rope
    if rope.scaling == "yarn":
        reach = int(rope.factor * rope.original_max_position_embeddings)
        if reach < seq_len:
            changes.append(
                f"model.rope reaches {reach} positions (factor times original_max_position_embeddings) and "
                f"train.seq_len is {seq_len}; a value to try: model.rope.factor="
                f"{math.ceil(seq_len / rope.original_max_position_embeddings)}"
            )
    return tuple(changes)


def _stretched_base(model: ModelConfig, times: float) -> float:
    """Return the base with which the slowest rotation is as far after `times` the context as it was before.

    NTK-aware scaling (arXiv:2309.00071, eq. 15).
    """
    dim = model.mla.qk_rope_head_dim if model.mla is not None else head_dim(model) * model.rope.fraction
    return model.rope.base * times ** (dim / max(dim - 2, 1))


def describe_changes(
    saved: Mapping[str, Any], present: Mapping[str, Any], sections: Sequence[str] = _STEERING_SECTIONS
) -> list[str]:
    """Return each field of the config that steers training and differs from the saved one: what, from what, to what."""
    changes: list[str] = []
    for section in sections:
        changes += _changed_fields(saved.get(section) or {}, present.get(section) or {}, section)
    return changes


def _changed_fields(before: Mapping[str, Any], after: Mapping[str, Any], path: str) -> Iterator[str]:
    """Yield the changed fields of a section; one within it that came or went is a change as a whole."""
    for name, value in after.items():
        was, field = before.get(name), f"{path}.{name}"
        if isinstance(was, Mapping) and isinstance(value, Mapping):
            yield from _changed_fields(was, value, field)
        elif name in before and was != value and field not in _QUIET_FIELDS:
            yield f"{field} is {value_text(value)}, it was {value_text(was)}"


def _all_changes(manifest: Manifest, config: Config) -> tuple[str, ...]:
    """Return the changed fields, and what they make of the learning rate that comes next."""
    saved = type(config).model_validate(manifest.config)
    step = manifest.state["step"]
    before, after = (
        compute_learning_rate(step, one.train.num_steps, one.optimizer, one.schedule) for one in (saved, config)
    )
    changes = describe_changes(manifest.config, resolved_dict(config))
    for name in ("init_from", "init_from_hf"):
        was, is_now = manifest.config["checkpoint"].get(name), getattr(config.checkpoint, name)
        if is_now is not None and was is not None and was != is_now:
            changes.append(
                f"checkpoint.{name} is {is_now}, it was {was}, and is not read again; another run.name begins there"
            )
    if before != after:
        changes.append(f"so the learning rate of step {step + 1} is {after:.3g}, it would have been {before:.3g}")
    return tuple(changes)


def _is_continuing(latest: Path, config: Config) -> bool:
    """Return whether the run's newest checkpoint is this same config's own: a job that was queued again."""
    try:
        return read_manifest(latest).config == resolved_dict(config)
    except BadInput:
        return False
