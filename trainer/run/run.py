"""The composition root: config -> objects, in one fixed order -> fit -> teardown.

The run directory is locked before anyone looks into it, and what can be refused is refused before anything is written.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from configs.errors import BadInput, ExitCode, PeerLost
from configs.roles import POLICY
from configs.sections.data import DataConfig
from configs.stages import ComparisonsConfig, Config, RftConfig, SftConfig, TeacherCacheConfig
from parallel.collectives import any_rank, on_all_ranks, on_rank_zero
from parallel.environment import Environment
from parallel.failures import describe_peer_loss, is_peer_loss
from parallel.mesh import Mesh, build_mesh, destroy_mesh, init_world
from parallel.platform import PlatformName, load_platform
from parallel.watch.phases import phase
from parallel.watch.watch import Watch
from trainer.data.corpus import Corpus, open_corpus
from trainer.engine.state import TrainState
from trainer.run.directory import RunLock, check_run_directory, open_run_directory
from trainer.run.preflight import check_hosts, is_due
from trainer.run.rejection import sample_answers
from trainer.run.second_models import FoundModel, find_second_models, load_second_models, plan_models
from trainer.run.signals import StopSignals
from trainer.run.start import Start, check_places, find_start
from trainer.run.teacher_cache import write_teacher_cache
from trainer.run.weights import load_peft_adapter, load_weights

if TYPE_CHECKING:
    from trainer.engine.sharded_model import ShardedModel
    from trainer.stages.base import Stage

log = logging.getLogger(__name__)


def run(config: Config, stage_name: str, environment: Environment, platform_name: PlatformName) -> ExitCode:
    """Run one training stage, or rejection sampling, from start to end on this rank and return the exit code.

    Raises ShardwrightError for what a user can mend. Collective: all ranks of the world must call this.
    """
    platform = load_platform(platform_name)
    problem = platform.check_precision(config.precision.compute)
    if config.precision.fp8 is not None and config.precision.fp8.backend != "emulated":
        problem = problem or platform.check_fp8(config.precision.fp8.recipe)
    if problem:
        raise BadInput(problem)
    check_run_directory(str(config.run.dir))
    data = _prepare_data(config, environment)
    device = platform.activate(environment.local_rank)
    init_world(platform, config, rank=environment.rank, world_size=environment.world_size, init_method="env://")
    try:
        mesh = build_mesh(platform, device, config)
        lock = RunLock(str(config.run.dir))
        watch = Watch(mesh, local_rank=environment.local_rank, timeout_seconds=config.parallel.timeout_seconds)
        with lock.held(mesh, patience_seconds=_patience(config, environment)):
            try:
                if is_due(config, environment):
                    check_hosts(config, mesh, environment.local_rank)
                corpus = on_all_ranks(lambda: open_corpus(config, data))
                if isinstance(config, RftConfig):
                    return sample_answers(corpus, environment, mesh, lock, watch)
                if isinstance(config, TeacherCacheConfig):
                    return write_teacher_cache(corpus, environment, mesh, lock, watch)
                return _run_locked(corpus, stage_name, environment, mesh, lock, watch)
            except Exception as error:
                lock.check()  # what failed may have, because the directory went
                _name_lost_rank(error, config, mesh, watch)
                raise
            finally:
                watch.stop()
    finally:
        destroy_mesh()
        dist.destroy_process_group()


def _name_lost_rank(error: Exception, config: Config, mesh: Mesh, watch: Watch) -> None:
    """Raise PeerLost with the rank that was lost, where the error says that one was and it is known which."""
    if not is_peer_loss(error, mesh.platform.is_peer_failure):
        return
    lost = watch.find_lost()
    if lost is not None:
        what = describe_peer_loss(error, config.parallel.timeout_seconds)
        raise PeerLost(f"{lost.describe()}: {what}") from error


def _prepare_data(config: Config, environment: Environment) -> DataConfig:
    """Return what is read, after tokenising what no earlier run has: on one rank of each host, without a time limit."""
    if not isinstance(config, SftConfig | ComparisonsConfig) or config.chat_template is None:
        return config.data
    from trainer.data.chat.cache import prepare_conversations

    if environment.local_rank == 0:
        check_places(config)
    return prepare_conversations(config, is_maker=environment.local_rank == 0)


def _patience(config: Config, environment: Environment) -> int:
    """Return for how many seconds a run waits for its directory: one that was queued again, for what it was before."""
    return config.parallel.timeout_seconds if environment.is_restart else 0


def _run_locked(
    corpus: Corpus, stage_name: str, environment: Environment, mesh: Mesh, lock: RunLock, watch: Watch
) -> ExitCode:
    config = corpus.config  # which knows how many steps its epochs are
    start = on_rank_zero(lambda: find_start(config, stage_name))
    on_all_ranks(partial(start.wait_until_visible, config.parallel.timeout_seconds))
    # From here on a signal saves and ends the run; before, there is nothing to save and it just ends.
    signals = StopSignals()
    # These import Megatron-Core, which must happen after the platform is active.
    from trainer.engine.build import open_models
    from trainer.stages.base import StageContext
    from trainer.stages.build import STAGES

    found = on_rank_zero(lambda: find_second_models(config, mesh.world_size, mesh.platform.name, start.resume_from))
    plans = plan_models(config, found)
    with open_models(plans, mesh) as models:
        stage = on_all_ranks(lambda: STAGES[stage_name](StageContext(config, mesh, models, corpus)))
        try:
            state = _load(config, mesh, start, stage, models[POLICY])
            load_second_models(models, plans)
            if state.step < config.train.num_steps:
                on_all_ranks(lambda: stage.start(state))
                for sentence in corpus.describe_order():
                    log.info(sentence)
            state = _fit(config, environment, mesh, start, found, models, stage, state, signals, lock, watch)
        finally:
            stage.close()
        if signals.is_agreed and state.step < config.train.num_steps:
            log.info("stopped by signal after saving step %d; the same command continues", state.step)
            return ExitCode.STOPPED_AFTER_SAVING
        _show_samples(config, models[POLICY], corpus, signals)
        return ExitCode.DONE


def _load(config: Config, mesh: Mesh, start: Start, stage: Stage, policy: ShardedModel) -> TrainState:
    """Put in place what the run starts from and return its progress."""
    from trainer.checkpoint.load import resume

    if start.base is not None:
        load_weights(policy, start.base.path)
    if start.resume_from is not None:
        return resume(config, mesh, stage, start.resume_from)
    weights = start.init_from or start.init_from_hf
    if weights is not None and start.base is None:
        load_weights(policy, str(weights))
    if config.lora is not None and config.lora.init_from is not None:
        load_peft_adapter(policy, config.lora.init_from)
    return TrainState()


def _fit(
    config: Config,
    environment: Environment,
    mesh: Mesh,
    start: Start,
    found: Mapping[str, FoundModel],
    models: Mapping[str, ShardedModel],
    stage: Stage,
    state: TrainState,
    signals: StopSignals,
    lock: RunLock,
    watch: Watch,
) -> TrainState:
    """Begin writing, train, and return where the run then is."""
    from trainer.checkpoint.save import CheckpointWriter
    from trainer.run.export import export_run_checkpoint, lacks_export
    from trainer.run.hooks import Hooks
    from trainer.run.loop import fit
    from trainer.run.stragglers import StragglerReport

    run_dir, is_exporting = Path(str(config.run.dir)), config.checkpoint.export_hf
    hooks = Hooks(
        config,
        mesh,
        stage,
        reporter=open_run_directory(config, mesh, run_dir, start, state, environment.launcher, watch),
        checkpoints=CheckpointWriter(
            run_dir,
            config,
            mesh,
            last_saved_step=state.step if start.resume_from else None,
            on_published=partial(export_run_checkpoint, config, mesh) if is_exporting else None,
            base=start.base,
            models={role: one.record for role, one in found.items()},
        ),
        signals=signals,
        lock=lock,
        stragglers=StragglerReport(mesh, watch),
        models=models,
    )
    if is_exporting and start.resume_from is not None and lacks_export(start.resume_from, run_dir):
        export_run_checkpoint(config, mesh, start.resume_from)
    if start.resume_from is not None and state.step >= config.train.num_steps:
        log.info("all %d steps of train.num_steps are done; nothing left to train", config.train.num_steps)
    return fit(stage, state, hooks, config.train.num_steps)


def _show_samples(config: Config, model: ShardedModel, corpus: Corpus, signals: StopSignals) -> None:
    """Continue the configured prompts and log the text, until a signal comes."""
    from trainer.generate.text import generate_text

    if corpus.tokenizer is None:
        return
    for prompt in config.sample.prompts:
        if any_rank(signals.is_received, model.mesh.device):
            return
        with phase("generate"):
            text = generate_text(model, corpus.tokenizer, prompt, config.sample, config.run.seed)
        log.info("sample: %s", prompt + text)
