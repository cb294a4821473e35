"""Which checkpoint is meant by a path, and what model it holds: one of ours, or one of Megatron-LM's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from configs.errors import BadInput
from configs.roles import HeadKind
from configs.sections.lora import LoraConfig
from configs.sections.model import ModelConfig
from parallel.collectives import first_of_ranks, on_rank_zero
from trainer.checkpoint.base_weights import BaseWeights, recorded_base
from trainer.checkpoint.layout import resolve_checkpoint
from trainer.checkpoint.manifest import find_damage, read_manifest
from trainer.checkpoint.tensors import CheckpointTensors
from trainer.hf.adapters import HfTensors, MergedTensors, StoredAdapters, TensorStore
from trainer.hf.companions import carried_folder
from trainer.hf.megatron_lm import find_megatron_checkpoint, read_megatron_model
from trainer.hf.rules import Rule
from trainer.hf.source import HfModel


@dataclass(frozen=True)
class ExportSource:
    """What is exported: a checkpoint of ours, or one that Megatron-LM wrote."""

    checkpoint: Path
    model: ModelConfig
    carried: Path | None = None
    """Folder with the `config.json` and companions of the model that the run began from."""
    tokenizer: str | None = None
    """Directory of the tokenizer that the run used."""
    template: str | None = None
    """Chat template that the run trained with in the place of the tokenizer's own."""
    lora: LoraConfig | None = None
    """Of a checkpoint that holds adapters alone."""
    base: BaseWeights | None = None
    """The weights that they belong to."""
    head: HeadKind = "vocabulary"
    """Whether it is a language model, or a reward model, which is written as a sequence classifier of one label."""


def find_export_source(path: Path, *, rank: int, world_size: int) -> ExportSource:
    """Return what to export, after hashing every file of a checkpoint of ours, each rank its share.

    Raises BadInput if there is no complete checkpoint, or a file has changed. Collective: all ranks must call this.
    """
    checkpoint = resolve_checkpoint(path)
    if checkpoint is None:
        theirs = find_megatron_checkpoint(path)
        if not path.exists():
            raise BadInput(f"{path}: does not exist; give a run directory or a checkpoint in one.")
        if theirs is None:
            raise BadInput(
                f"{path}: holds no complete checkpoint; give a run directory such as runs/demo, or "
                "runs/demo/checkpoints/step_00000100."
            )
        return ExportSource(theirs, read_megatron_model(theirs))
    source = describe_source(checkpoint)
    checked: Path | None = checkpoint
    while checked is not None:
        manifest = on_rank_zero(partial(read_manifest, checked))
        mine = sorted(manifest.files)[rank::world_size]
        damage = first_of_ranks(next(iter(find_damage(checked, manifest, mine)), None))
        if damage is not None:
            raise BadInput(f"{damage}; the checkpoint cannot be trusted, export another one.")
        base = recorded_base(manifest.base, checked)
        checked = Path(base.path) if base is not None and base.is_checkpoint else None
    return source


def describe_source(checkpoint: Path) -> ExportSource:
    """Return a checkpoint of ours as what is exported, with the base of one that holds adapters. Raises BadInput."""
    manifest = read_manifest(checkpoint)
    config, lora = manifest.config, manifest.config.get("lora")
    return ExportSource(
        checkpoint,
        ModelConfig.model_validate(config["model"]),
        carried_folder(checkpoint.parent.parent),
        config["data"]["tokenizer"],
        manifest.template,
        lora=None if lora is None else LoraConfig.model_validate(lora),
        base=recorded_base(manifest.base, checkpoint),
        head=manifest.head,
    )


def open_tensors(source: ExportSource, rules: Sequence[Rule]) -> TensorStore:
    """Return the whole model's tensors by their names in the engine, adapters merged into their base's."""
    stored = CheckpointTensors(source.checkpoint)
    if source.lora is None or source.base is None:
        return stored
    base: TensorStore
    if source.base.is_checkpoint:
        base = open_tensors(describe_source(Path(source.base.path)), rules)
    else:
        base = HfTensors(HfModel(source.base.path, source.model))
    by_name = {rule.megatron.name: rule for rule in rules}
    return MergedTensors(base, StoredAdapters(stored, source.model, source.lora), by_name)
