"""What can be said of a config before anything is started: on this machine, and for a plan on any. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from configs.errors import BadInput
from configs.stages import Config
from launch.causes import describe_os_error
from parallel.environment import Environment
from parallel.platform import PlatformName, has_transformer_engine
from parallel.platform.host_memory import host_memory_bytes
from parallel.platform.processor import lacks_units

if TYPE_CHECKING:
    from configs.plan.others import Others

_GIB = 2**30


def config_problems(config: Config, world_size: int, platform_name: PlatformName, *, has_te: bool) -> list[str]:
    """Return every rule that the config breaks on this many ranks, one sentence each."""
    from configs.rules.check import check_config

    return check_config(config, world_size, platform=platform_name, has_te=has_te)


def machine_problems(config: Config, platform_name: PlatformName) -> list[str]:
    """Return what this version, or this machine's devices, cannot do."""
    from configs.rules.fp8 import check_backend

    fp8 = config.precision.fp8
    problems: list[str] = []
    if fp8 is not None:
        problems += check_backend(fp8, platform=platform_name, has_te=has_transformer_engine())
    return problems


def path_problems(config: Config) -> list[str]:
    """Return the paths of the config that are closed to this user."""
    from configs.rules.paths import check_paths

    return list(check_paths(config))


def memory_problem(config: Config, environment: Environment, platform_name: PlatformName) -> str | None:
    """Return a sentence if the ranks of this host could not even hold the model's state in its memory.

    Of a GPU's memory the allocator says so itself; a host ends the process without a word.
    """
    from configs.plan.derive import derive_layout
    from configs.plan.estimate import estimate_stages

    memory = host_memory_bytes()
    if platform_name != "cpu" or memory is None:
        return None
    stages = estimate_stages(config, derive_layout(config, environment.world_size))
    state = min(stage.weights + stage.gradients + stage.optimizer for stage in stages)
    needed = state * environment.local_world_size
    if needed <= memory:
        return None
    return (
        f"model: weights, gradients and optimizer state of {environment.local_world_size} rank(s) on this host take "
        f"{needed / _GIB:,.1f} GiB, and it has {memory / _GIB:,.1f} GiB of memory; what would work: more hosts with a "
        "larger parallel.tp or parallel.pp, or a smaller model (--dry-run shows what each rank takes)"
    )


def slowness(config: Config, platform_name: PlatformName) -> str | None:
    """Return a sentence if this machine computes the config's number format far more slowly than another."""
    compute = config.precision.compute
    if platform_name != "cpu" or not lacks_units(compute):
        return None
    return (
        f"precision.compute: this processor has no units for {compute}, and matrix multiplications in it may take over "
        "100 times longer than in fp32; precision.compute=fp32 is far faster here"
    )


def start_problems(config: Config, stage_name: str, *, is_start_to_come: bool = False) -> Iterator[str]:
    """Yield why the run cannot begin with what the config names, as far as that is on this machine.

    That is the checkpoint it would continue, else the weights that it would start with, unless these are to come.
    """
    for check in (_check_continued,) if is_start_to_come else (_check_continued, _check_weights):
        try:
            check(config, stage_name)
        except BadInput as error:
            yield str(error)
        except OSError as error:  # such as a folder inside that this user may not enter
            yield describe_os_error(error)


def _check_continued(config: Config, stage_name: str) -> None:
    from trainer.checkpoint.layout import existing_checkpoint, latest_checkpoint
    from trainer.checkpoint.manifest import another_run, check_continues, read_manifest

    resume, run_dir = config.checkpoint.resume, str(config.run.dir)
    checkpoint = latest_checkpoint(run_dir)
    if resume == "never" and checkpoint is not None:
        raise BadInput(
            f"checkpoint.resume: never, but {run_dir} holds checkpoints; {another_run(config)}, or "
            "checkpoint.resume=auto, which continues."
        )
    if resume not in ("auto", "never") and os.path.exists(resume):
        checkpoint = existing_checkpoint(resume, "checkpoint.resume")
    if checkpoint is not None:
        check_continues(read_manifest(checkpoint), config, stage_name, checkpoint)


def _check_weights(config: Config, _stage_name: str) -> None:
    from configs.load import resolved_dict
    from trainer.checkpoint.layout import existing_checkpoint
    from trainer.checkpoint.manifest import FREE_WARM_START_FIELDS, check_architecture, check_head, read_manifest
    from trainer.hf.config_json import check_same_architecture

    hf, checkpoint = config.checkpoint.init_from_hf, config.checkpoint.init_from
    if hf is not None and os.path.isdir(hf):
        check_same_architecture(config.model, Path(hf), FREE_WARM_START_FIELDS)
    if checkpoint is not None and os.path.exists(checkpoint):
        found = existing_checkpoint(checkpoint, "checkpoint.init_from")
        manifest = read_manifest(found)
        check_architecture(manifest, resolved_dict(config)["model"], found, is_warm_start=True)
        check_head(manifest.head, config.head, found, may_be_new=True)


def find_others(config: Config, world_size: int, platform_name: PlatformName) -> tuple[Others, list[str]]:
    """Return the models beside the policy that are on this machine, and what of them does not fit the run.

    Of a run that goes on nothing is looked at: it has them in its checkpoint.
    """
    from configs.plan.others import OtherModel
    from trainer.checkpoint.layout import latest_checkpoint
    from trainer.run.second_models import find_second_model

    others, problems = {}, []
    is_fresh = config.checkpoint.resume in ("auto", "never") and latest_checkpoint(str(config.run.dir)) is None
    for role, second in config.second_models.items():
        if not os.path.exists(second.place):
            continue
        try:
            found = find_second_model(second, config, world_size, platform_name)
            others[role] = OtherModel(found.config, second.head, second.is_trained)
        except BadInput as error:
            problems += [str(error)] if is_fresh else []
        except OSError as error:  # such as a folder inside that this user may not enter
            problems += [describe_os_error(error)] if is_fresh else []
    return others, problems


def data_problems(config: Config) -> Iterator[str]:
    """Yield what of the tokenizer and the data on this machine does not fit the config; opens headers alone."""
    from trainer.data.presence import find_data_problems
    from trainer.data.tokenizer import load_tokenizer

    data, model = config.data, config.model
    if data.tokenizer is not None and os.path.exists(data.tokenizer):
        try:
            num_ids = load_tokenizer(data.tokenizer).vocab_size
        except BadInput as error:
            yield f"data.tokenizer: {error}"
        else:
            if num_ids > model.vocab_size:
                yield (
                    f"model.vocab_size: {model.vocab_size} is less than the {num_ids} token ids of data.tokenizer "
                    f"{data.tokenizer}; a value that would work: {num_ids}"
                )
    yield from find_data_problems(config, is_plan=True)
