"""The composition root: config -> objects, in one fixed order -> fit -> teardown."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from configs.errors import BadInput, ExitCode
from configs.fp8 import resolve_backend, uses_te_layers
from configs.stages import Config
from parallel.collectives import any_rank, broadcast_object
from parallel.environment import Environment
from parallel.mesh import Mesh, build_mesh, destroy_mesh, init_world
from parallel.platform import PlatformName, has_transformer_engine, load_platform
from parallel.replicate import replicate
from parallel.seeding import seed_everything
from trainer.checkpoint.layout import checkpoints_dir, remove_leftovers, set_aside_after
from trainer.data.corpus import Corpus, open_corpus
from trainer.engine.state import TrainState
from trainer.hf.companions import carried_folder, carry
from trainer.report.live import LiveLine
from trainer.report.sinks import MetricsWriter
from trainer.run.directory import RunLock, describe_environment, show_start, start_rank_log, write_run_files
from trainer.run.signals import StopSignals
from trainer.run.start import Start, find_start

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

    from trainer.engine.engine import Engine
    from trainer.model.fp8.attach import Fp8State
    from trainer.report.reporter import Reporter

log = logging.getLogger(__name__)


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
    if config.precision.fp8 is not None and config.precision.fp8.backend != "emulated":
        problem = problem or platform.check_fp8(config.precision.fp8.recipe)
    if problem:
        raise BadInput(problem)
    start = find_start(config)
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


def _train(config: Config, mesh: Mesh, job: _Job) -> ExitCode:
    engine = build_engine(config, mesh)
    try:
        return _train_with(engine, job)
    finally:
        engine.close()


def build_engine(config: Config, mesh: Mesh) -> Engine:
    """Return the engine of a run with initial weights. Collective: all ranks of the world must call this."""
    # These import Megatron-Core, which must happen after the platform is active.
    from trainer.engine.engine import Engine
    from trainer.model.build import build_model_chunks
    from trainer.optim.update import build_optimizer

    seed_everything(config.run.seed, mesh.pp_rank)
    is_overlapping = mesh.platform.overlaps_communication
    use_te = uses_te_layers(config, has_te=has_transformer_engine())
    chunks = build_model_chunks(config, mesh, use_te=use_te)
    fp8 = _attach_fp8(config, mesh, chunks)
    replicas = replicate(chunks, config, is_overlapping=is_overlapping)
    return Engine(config, mesh, replicas, build_optimizer(config, replicas, mesh.platform), fp8)


def _attach_fp8(config: Config, mesh: Mesh, chunks: list[GPTModel]) -> Fp8State | None:
    """Give the layers FP8 multiplications of our own, unless there are to be none or Transformer Engine has them."""
    from trainer.model.fp8.attach import attach_fp8

    fp8 = config.precision.fp8
    if fp8 is None:
        return None
    backend = resolve_backend(fp8, has_te=has_transformer_engine())
    return None if backend == "te" else attach_fp8(chunks, fp8, config.model, mesh, backend)


def _train_with(engine: Engine, job: _Job) -> ExitCode:
    from trainer.checkpoint.load import resume, warm_start
    from trainer.checkpoint.save import CheckpointWriter
    from trainer.evaluate.validation import Evaluator
    from trainer.hf.warm_start import load_hf_weights
    from trainer.run.hooks import Hooks
    from trainer.run.loop import fit
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
    if config.checkpoint.export_hf and start.resume_from is not None and _lacks_export(start.resume_from, run_dir):
        _export(engine, start.resume_from)
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
    from trainer.report.reporter import Reporter

    config, mesh, start = engine.config, engine.mesh, job.start
    details = describe_environment(config, mesh, has_te=has_transformer_engine())
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


def _lacks_export(checkpoint: Path, run_dir: Path) -> bool:
    """Return whether a kill kept the run's own checkpoint from being exported. Collective: all ranks must call this."""
    is_own = checkpoint.parent == checkpoints_dir(run_dir).resolve()
    return bool(broadcast_object(is_own and not (checkpoint / "hf").exists()))


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
    for note in report.notes:
        log.warning("%s: %s", checkpoint / "hf", note)
    if report.non_finite:
        log.warning("%s holds NaN or infinite values: %s", checkpoint / "hf", report.non_finite)


def show_samples(config: Config, engine: Engine, corpus: Corpus, signals: StopSignals) -> None:
    """Continue the configured prompts and log the text, until a signal comes.

    Collective: all ranks of the world must call this.
    """
    from trainer.generate.text import generate_text

    if corpus.tokenizer is None:
        return
    for prompt in config.sample.prompts:
        if any_rank(signals.is_received, engine.mesh.device):
            return
        text = generate_text(engine, corpus.tokenizer, prompt, config.sample, config.run.seed)
        log.info("sample: %s", prompt + text)
