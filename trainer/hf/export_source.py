"""Which checkpoint is meant by a path, and what model it holds: one of ours, or one of Megatron-LM's."""

from __future__ import annotations

from pathlib import Path

from configs.errors import BadInput
from configs.sections.model import ModelConfig
from parallel.collectives import gather_objects
from trainer.checkpoint.layout import resolve_checkpoint
from trainer.checkpoint.manifest import find_damage, read_manifest
from trainer.hf.companions import carried_folder
from trainer.hf.exporting import ExportSource
from trainer.hf.megatron_lm import find_megatron_checkpoint, read_megatron_model


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
    manifest = read_manifest(checkpoint)
    mine = sorted(manifest.files)[rank::world_size]
    problems = [problem for part in gather_objects(find_damage(checkpoint, manifest, mine)) for problem in part]
    if problems:
        raise BadInput(f"{problems[0]}; the checkpoint cannot be trusted, export another one.")
    model, tokenizer = ModelConfig.model_validate(manifest.config["model"]), manifest.config["data"]["tokenizer"]
    return ExportSource(checkpoint, model, carried_folder(checkpoint.parent.parent), tokenizer)
