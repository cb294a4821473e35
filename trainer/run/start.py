"""Where a run begins: fresh, at a checkpoint, or with the weights of a checkpoint or of a Hugging Face model."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from configs.errors import BadInput
from configs.load import resolved_dict
from configs.stages import Config
from trainer.checkpoint.layout import existing_checkpoint, latest_checkpoint
from trainer.checkpoint.manifest import FREE_WARM_START_FIELDS, check_architecture, read_manifest
from trainer.hf.companions import carried_config, carried_folder
from trainer.hf.config_json import check_same_architecture, write_model
from trainer.hf.source import HfModel
from trainer.run.directory import check_run_directory

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """Where the run begins: at most one of the three is set."""

    resume_from: Path | None = None
    init_from: Path | None = None
    init_from_hf: HfModel | None = None

    def describe(self) -> str:
        """Return the start in words."""
        if self.resume_from is not None:
            return f"resuming from {self.resume_from}"
        weights = self.init_from or (self.init_from_hf and self.init_from_hf.directory)
        return f"starting with the weights of {weights}" if weights else "a fresh start"

    @property
    def carried(self) -> Path | None:
        """Directory with the `config.json` and companions of the Hugging Face model that the weights come from."""
        if self.init_from_hf is not None:
            return self.init_from_hf.directory
        checkpoint = self.resume_from or self.init_from
        return carried_folder(checkpoint.parent.parent) if checkpoint is not None else None


def find_start(config: Config) -> Start:
    """Return where the run begins, after checking that it can, and that it can be exported. Raises BadInput."""
    start = _find(config)
    if config.checkpoint.export_hf:
        write_model(config.model, carried_config(start.carried))
    return start


def _find(config: Config) -> Start:
    settings, run_dir = config.checkpoint, config.run.dir
    assert run_dir is not None
    check_run_directory(run_dir)
    model = resolved_dict(config)["model"]
    resume_from = latest_checkpoint(run_dir)
    if settings.resume == "never":
        if resume_from is not None:
            raise BadInput(
                f"checkpoint.resume: never, but {run_dir} holds checkpoints; choose another run.dir, or resume=auto."
            )
    elif settings.resume != "auto":
        named = existing_checkpoint(settings.resume, "checkpoint.resume")
        if resume_from is not None and resume_from != named and _is_continuing(resume_from, config):
            log.info("checkpoint.resume: this very command has already gone back to %s; it continues from there", named)
        else:
            resume_from = named
    if resume_from is not None:
        manifest = read_manifest(resume_from)
        check_architecture(manifest, model, resume_from, is_warm_start=False)
        saved_seed = manifest.config["run"]["seed"]
        if saved_seed != config.run.seed:
            raise BadInput(
                f"run.seed: {config.run.seed} differs from the {saved_seed} of {resume_from}, on which the order of "
                f"the data hangs; use {saved_seed}, or begin anew from its weights with checkpoint.init_from."
            )
        return Start(resume_from=resume_from)
    if settings.init_from_hf is not None:
        return Start(init_from_hf=_open_hf_model(settings.init_from_hf, config))
    if settings.init_from is None:
        return Start()
    init_from = existing_checkpoint(settings.init_from, "checkpoint.init_from")
    check_architecture(read_manifest(init_from), model, init_from, is_warm_start=True)
    return Start(init_from=init_from)


def _open_hf_model(directory: str, config: Config) -> HfModel:
    """Return the model whose weights the run starts with, after comparing its architecture with the config's."""
    check_same_architecture(config.model, Path(directory), FREE_WARM_START_FIELDS)
    return HfModel(directory, config.model)


def _is_continuing(latest: Path, config: Config) -> bool:
    """Return whether the run's newest checkpoint is this same config's own: a job that was queued again."""
    try:
        return read_manifest(latest).config == resolved_dict(config)
    except BadInput:
        return False
