"""What every entry point does: config, environment, platform, checks, then the trainer; errors become exit codes.

Exit codes are `configs.errors.ExitCode` (and 1 for a bug, with its traceback; 130 for Ctrl-C). torchrun exits 1
whatever code its workers had; `python -m launch.local` and `srun` hand it on. Torch-free until all has been checked.
"""

from __future__ import annotations

import math
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from configs.errors import BadInput, ExitCode, PeerLost, ShardwrightError
from configs.stages import Config
from launch.cli import Arguments, parse_arguments, usage
from parallel.environment import Environment
from parallel.failures import is_peer_loss, let_rank_zero_speak, report
from parallel.launcher_variables import find_environment
from parallel.platform import (
    CLUSTER_PLATFORM,
    PlatformName,
    detect_platform_name,
    has_transformer_engine,
    load_platform,
)

_INTERRUPTED = 130


def main(stage_name: str, argv: Sequence[str]) -> int:
    """Run one training stage as the command line `argv` says and return the exit code for the shell."""
    rank = 0
    try:
        arguments = parse_arguments(argv, stage_name)
        if arguments.help:
            _print_help(stage_name)
            return ExitCode.DONE
        environment = find_environment(os.environ)
        rank = environment.rank
        config = _load(arguments, stage_name)
        if arguments.dry_run:
            return _dry_run(config, arguments, environment)
        platform_name = detect_platform_name()
        _check(config, environment.world_size, platform_name)
        return _train(config, stage_name, environment, platform_name)
    except BadInput as error:
        let_rank_zero_speak(rank)
        report(str(error), error.exit_code, rank=rank)
        return error.exit_code
    except BrokenPipeError:  # `--help | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.DONE
    except KeyboardInterrupt:
        if rank == 0:
            print("interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return _INTERRUPTED


def is_training(stage_name: str, argv: Sequence[str], world_size: int) -> bool:
    """Return whether the command line trains, not only prints; raises BadInput where `main` would refuse it."""
    arguments = parse_arguments(argv, stage_name)
    if arguments.help or arguments.dry_run:
        return False
    _check(_load(arguments, stage_name), world_size, detect_platform_name())
    return True


def _print_help(stage_name: str) -> None:
    from configs.plan.show import field_help

    print(usage(stage_name))
    print("\nfields of the config:\n")
    print(field_help(stage_name))


def _load(arguments: Arguments, stage_name: str) -> Config:
    from configs.load import load_config

    assert arguments.config_path is not None  # parse_arguments refuses a command line without one
    return load_config(arguments.config_path, arguments.overrides, stage_name)


def _check(config: Config, world_size: int, platform_name: PlatformName) -> None:
    """Raise BadInput with every cross-field problem and whatever of the data is not there, one a line."""
    from trainer.data.presence import find_data_problems

    problems = _problems(config, world_size, platform_name, has_te=has_transformer_engine())
    problems += _machine_problems(config, platform_name) + find_data_problems(config)
    if problems:
        raise BadInput("\n".join(problems))


def _problems(config: Config, world_size: int, platform_name: PlatformName, *, has_te: bool) -> list[str]:
    from configs.rules.check import check_config

    return check_config(config, world_size, platform=platform_name, has_te=has_te)


def _machine_problems(config: Config, platform_name: PlatformName) -> list[str]:
    """Return what this version, or this machine's devices, cannot do."""
    from configs.rules.fp8 import check_backend
    from configs.rules.layout import check_runnable

    fp8, problems = config.precision.fp8, list(check_runnable(config))
    if fp8 is not None:
        problems += check_backend(fp8, platform=platform_name, has_te=has_transformer_engine())
    return problems


def _dry_run(config: Config, arguments: Arguments, environment: Environment) -> int:
    """Print what a run of this config would be, perhaps on other machines than this one; writes nothing."""
    from configs.plan.derive import derive_layout
    from configs.plan.show import describe

    world_size = arguments.world_size
    if world_size is None:
        started_by_hand = environment.launcher == "single"
        world_size = _fewest_ranks(config) if started_by_hand else environment.world_size
    platform_name = detect_platform_name()
    problems = _problems(config, world_size, CLUSTER_PLATFORM, has_te=True)
    if problems:
        raise BadInput("\n".join(problems))
    _check_weights(config)
    if environment.rank == 0:
        print(describe(config, derive_layout(config, world_size)))
        here = _problems(config, world_size, platform_name, has_te=has_transformer_engine())
        for problem in here + _machine_problems(config, platform_name):
            print(f"not on this machine  {problem}")
    return ExitCode.DONE


def _check_weights(config: Config) -> None:
    """Raise BadInput if the weights to start from are on this machine and are another architecture's."""
    from configs.load import resolved_dict
    from trainer.checkpoint.layout import existing_checkpoint
    from trainer.checkpoint.manifest import FREE_WARM_START_FIELDS, check_architecture, read_manifest
    from trainer.hf.config_json import check_same_architecture

    settings = config.checkpoint
    if settings.init_from_hf is not None and os.path.isfile(os.path.join(settings.init_from_hf, "config.json")):
        check_same_architecture(config.model, Path(settings.init_from_hf), FREE_WARM_START_FIELDS)
    if settings.init_from is not None and os.path.exists(settings.init_from):
        checkpoint = existing_checkpoint(settings.init_from, "checkpoint.init_from")
        model = resolved_dict(config)["model"]
        check_architecture(read_manifest(checkpoint), model, checkpoint, is_warm_start=True)


def _fewest_ranks(config: Config) -> int:
    """Return the smallest world the layout fits: tp*cp and ep*etp each divide the ranks of a pipeline stage."""
    sizes = config.parallel
    return sizes.pp * math.lcm(sizes.tp * sizes.cp, sizes.ep * (sizes.etp or sizes.tp) if sizes.ep > 1 else 1)


def _train(config: Config, stage_name: str, environment: Environment, platform_name: PlatformName) -> int:
    """Hand over to the trainer and turn what it raises into one sentence and an exit code."""
    os.environ.update(environment.as_variables())
    try:
        from trainer.report.log import start_console

        start_console(environment.rank)
        from trainer.run.run import run

        return run(config, stage_name, environment, platform_name)
    except ShardwrightError as error:
        failure: ShardwrightError = error
    except Exception as error:
        if not is_peer_loss(error, load_platform(platform_name).is_peer_failure):
            traceback.print_exc()
            report(f"{type(error).__name__}: {error}", 1, rank=environment.rank)
            return 1
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        failure = PeerLost(
            f"another rank was lost or did not answer within {config.parallel.timeout_seconds} seconds "
            f"(parallel.timeout_seconds): {first_line}; the same command continues from the last checkpoint"
        )
    let_rank_zero_speak(environment.rank)
    report(str(failure), failure.exit_code, rank=environment.rank)
    return failure.exit_code
