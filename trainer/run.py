"""The composition root: config -> objects, in one fixed order -> fit -> teardown."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from configs.errors import BadInput, ExitCode
from configs.load import resolved_dict
from configs.schema import Config
from parallel.collectives import any_rank
from parallel.environment import Environment
from parallel.mesh import Mesh, build_mesh, destroy_mesh, init_world
from parallel.platform import PlatformName, has_transformer_engine, load_platform
from parallel.replicate import replicate
from parallel.seeding import seed_everything
from trainer.checkpoint.layout import (
    checkpoints_dir,
    latest_checkpoint,
    remove_leftovers,
    resolve_checkpoint,
    set_aside_after,
)
from trainer.checkpoint.manifest import FREE_WARM_START_FIELDS, check_architecture, read_manifest
from trainer.data.corpus import Corpus, open_corpus
from trainer.hf.companions import carried_folder, carry
from trainer.hf.config_json import compare_models, load_config_json, read_model, write_model
from trainer.hf.source import HfModel
from trainer.metrics import LiveLine, MetricsWriter
from trainer.run_directory import (
    RunLock,
    check_run_directory,
    describe_environment,
    show_start,
    start_rank_log,
    write_run_files,
)
from trainer.signals import StopSignals
from trainer.state import TrainState

if TYPE_CHECKING:
    from trainer.engine import Engine
    from trainer.hooks import Reporter

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


@dataclass(frozen=True)
class _Job:
    """What a run consists of beside the engine."""

    stage_name: str
    launcher: str
    corpus: Corpus
    start: Start
    signals: StopSignals
    lock: RunLock


def run(config: Config, stage_name: str, environment: Environment, platform_name: PlatformName) -> ExitCode:
    """Run one training stage from start to end on this rank and return the exit code.

    Raises ShardwrightError for what a user can mend. Collective: all ranks of the world must call this.
    """
    platform = load_platform(platform_name)
    problem = platform.check_precision(config.precision.compute)
    if problem:
        raise BadInput(problem)
    start = find_start(config)
    if config.checkpoint.export_hf:
        write_model(
            config.model, load_config_json(start.carried) if start.carried else None
        )  # refuses what no family has
    device = platform.activate(environment.local_rank)
    corpus = open_corpus(config)
    init_world(platform, config, rank=environment.rank, world_size=environment.world_size, init_method="env://")
    try:
        mesh = build_mesh(platform, device, config)
        # From here on a signal saves and ends the run; before, there is nothing to save and it just ends.
        lock = RunLock(str(config.run.dir))
        try:
            return _train(config, mesh, _Job(stage_name, environment.launcher, corpus, start, StopSignals(), lock))
        finally:
            lock.release()
    finally:
        destroy_mesh()
        dist.destroy_process_group()


def find_start(config: Config) -> Start:
    """Return where the run begins, after checking that it can. Torch-free; raises BadInput."""
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
        named = _existing(settings.resume, "checkpoint.resume")
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
    init_from = _existing(settings.init_from, "checkpoint.init_from")
    check_architecture(read_manifest(init_from), model, init_from, is_warm_start=True)
    return Start(init_from=init_from)


def _open_hf_model(directory: str, config: Config) -> HfModel:
    """Return the model whose weights the run starts with, after comparing its architecture with the config's."""
    theirs = read_model(load_config_json(Path(directory)), Path(directory) / "config.json")
    free = tuple(f"model.{name}" for name in FREE_WARM_START_FIELDS)
    differences = [line for line in compare_models(config.model, theirs) if not line.startswith(free)]
    if differences:
        raise BadInput(
            f"checkpoint.init_from_hf: {directory} is another architecture ({'; '.join(differences)}); "
            f"python tools/convert_hf.py model {directory} prints the section that fits."
        )
    return HfModel(directory, config.model)


def _is_continuing(latest: Path, config: Config) -> bool:
    """Return whether the run's newest checkpoint is this same config's own: a job that was queued again."""
    try:
        return read_manifest(latest).config == resolved_dict(config)
    except BadInput:
        return False


def _existing(path: str, field: str) -> Path:
    checkpoint = resolve_checkpoint(path)
    if checkpoint is None:
        raise BadInput(f"{field}: {path} holds no complete checkpoint; name one like runs/<name>/checkpoints/latest.")
    return checkpoint


def _train(config: Config, mesh: Mesh, job: _Job) -> ExitCode:
    engine = build_engine(config, mesh)
    try:
        return _train_with(engine, job)
    finally:
        engine.close()


def build_engine(config: Config, mesh: Mesh) -> Engine:
    """Return the engine of a run with initial weights. Collective: all ranks of the world must call this."""
    # These import Megatron-Core, which must happen after the platform is active.
    from trainer.engine import Engine
    from trainer.model.build import build_model_chunks
    from trainer.optimizer import build_optimizer

    seed_everything(config.run.seed, mesh.pp_rank)
    is_overlapping = mesh.platform.overlaps_communication
    chunks = build_model_chunks(config, mesh, use_te=has_transformer_engine())
    replicas = replicate(chunks, config, is_overlapping=is_overlapping)
    return Engine(config, mesh, replicas, build_optimizer(config, replicas, is_overlapping=is_overlapping))


def _train_with(engine: Engine, job: _Job) -> ExitCode:
    from trainer.checkpoint.load import resume, warm_start
    from trainer.checkpoint.save import CheckpointWriter
    from trainer.evaluate import Evaluator
    from trainer.hf.warm_start import load_hf_weights
    from trainer.hooks import Hooks
    from trainer.loop import fit
    from trainer.stages.build import build_stage

    config, mesh, start, signals = engine.config, engine.mesh, job.start, job.signals
    stage = build_stage(job.stage_name, job.corpus, mesh)
    state = TrainState()
    if start.resume_from is not None:
        state = resume(engine, stage, start.resume_from)
    elif start.init_from is not None:
        warm_start(engine, start.init_from)
    elif start.init_from_hf is not None:
        load_hf_weights(engine, start.init_from_hf)
    run_dir = Path(str(config.run.dir))
    job.lock.take(mesh)
    hooks = Hooks(
        config,
        engine,
        stage,
        reporter=_open_run_directory(engine, run_dir, job, state),
        evaluator=Evaluator(job.corpus.build_validation_readers(dp_rank=mesh.dp_rank, dp_size=mesh.dp_size)),
        checkpoints=CheckpointWriter(
            run_dir,
            config.checkpoint,
            engine,
            last_saved_step=state.step if start.resume_from else None,
            on_published=partial(_export, engine) if config.checkpoint.export_hf else None,
        ),
        signals=signals,
    )
    if start.resume_from is not None and state.step >= config.train.num_steps:
        log.info("all %d steps of train.num_steps are done; nothing left to train", config.train.num_steps)
    state = fit(engine, stage, state, hooks, config.train.num_steps)
    if signals.is_agreed and state.step < config.train.num_steps:
        log.info("stopped by signal after saving step %d; the same command continues", state.step)
        return ExitCode.STOPPED_AFTER_SAVING
    show_samples(config, engine, job.corpus, signals)
    return ExitCode.DONE


def _open_run_directory(engine: Engine, run_dir: Path, job: _Job, state: TrainState) -> Reporter:
    """Begin writing: the first thing on disk, after everything that can be refused has been checked."""
    from trainer.hooks import Reporter

    config, mesh, start = engine.config, engine.mesh, job.start
    details = describe_environment(mesh, use_te=has_transformer_engine())
    try:
        start_rank_log(run_dir, mesh)
    except OSError as error:
        raise BadInput(f"run.dir: {run_dir} cannot be written to ({error}); choose another path.") from error
    log.info("%s: %s", config.run.name, start.describe())
    if mesh.rank != 0:
        return Reporter(config, engine, None, None)
    write_run_files(config, details, run_dir, launcher=job.launcher)
    remove_leftovers(run_dir)
    if start.resume_from is not None and start.resume_from.parent == checkpoints_dir(run_dir).resolve():
        for aside in set_aside_after(run_dir, state.step):
            log.info("%s: set aside, since the run goes back to step %d", aside, state.step)
    if start.carried is not None and start.resume_from is None:
        carry(start.carried, run_dir)
    show_start(config, details)
    writer = MetricsWriter(run_dir, tensorboard=config.log.tensorboard, resume_step=state.step)
    live = LiveLine(config.train.num_steps, start_step=state.step, log_every=config.train.log_every)
    return Reporter(config, engine, writer, live)


def _export(engine: Engine, checkpoint: Path) -> None:
    """Write a checkpoint as a Hugging Face model too. Collective: all ranks of the world must call this."""
    from trainer.hf.exporting import ExportSource, export_checkpoint

    config, mesh = engine.config, engine.mesh
    carried = carried_folder(checkpoint.parent.parent)
    report = export_checkpoint(
        ExportSource(checkpoint, config.model, carried, config.data.tokenizer),
        checkpoint / "hf",
        dtype=None,
        rank=mesh.rank,
        world_size=mesh.world_size,
        on_bytes=lambda done: None,
    )
    log.info("exported %s (%.1f s)", checkpoint / "hf", report.seconds)
    if report.non_finite:
        log.warning("%s holds NaN or infinite values: %s", checkpoint / "hf", report.non_finite)


def show_samples(config: Config, engine: Engine, corpus: Corpus, signals: StopSignals) -> None:
    """Continue the configured prompts and log the text, until a signal comes.

    Collective: all ranks of the world must call this.
    """
    from trainer.rollout.generate import generate_text

    if corpus.tokenizer is None:
        return
    for prompt in config.sample.prompts:
        if any_rank(signals.is_received, engine.mesh.device):
            return
        text = generate_text(engine, corpus.tokenizer, prompt, config.sample, config.run.seed)
        log.info("sample: %s", prompt + text)
