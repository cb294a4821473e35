"""What every entry point does: config, environment, platform, checks, then the trainer; errors become exit codes.

Exit codes are `configs.errors.ExitCode` (and 1 for a bug, with its traceback; 130 for Ctrl-C). torchrun exits 1
whatever code its workers had; `python -m launch.local` and `srun` hand it on. Torch-free until all has been checked.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import traceback
from collections.abc import Sequence

from configs.errors import BadInput, ExitCode, NonFinite, PeerLost, ShardwrightError
from configs.stages import Config
from launch.causes import describe_cause, describe_continuation, describe_os_error
from launch.checks import (
    config_problems,
    find_others,
    machine_problems,
    memory_problem,
    path_problems,
    slowness,
    start_problems,
)
from launch.cli import Arguments, parse_arguments, usage
from launch.dry_run import dry_run
from parallel.environment import Environment
from parallel.failures import describe_peer_loss, flush_streams, is_peer_loss, let_rank_zero_speak, report
from parallel.launcher_variables import find_environment, is_restart
from parallel.platform import PlatformName, detect_platform_name, has_transformer_engine, load_platform

log = logging.getLogger(__name__)
_INTERRUPTED = 130
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main(stage_name: str, argv: Sequence[str]) -> int:
    """Run one training stage as the command line `argv` says and return the exit code for the shell."""
    rank, config = 0, None
    try:
        arguments = parse_arguments(argv, stage_name)
        if arguments.help:
            _print_help(stage_name)
            return ExitCode.DONE
        environment = find_environment(os.environ)
        rank = environment.rank
        config, problems = _load(arguments, stage_name)
        if arguments.dry_run:
            return dry_run(config, problems, stage_name, arguments.world_size, environment)
        platform_name = detect_platform_name()
        _check(config, problems, stage_name, environment, platform_name)
        return _train(config, stage_name, environment, platform_name)
    except BadInput as error:
        let_rank_zero_speak(rank)
        report(str(error), error.exit_code, rank=rank)
        return error.exit_code
    except BrokenPipeError:  # `--help | head`: the reader has seen enough
        flush_streams()
        return ExitCode.DONE
    except OSError as error:  # of what a path leads to; that of a run is told by `_train`
        if error.filename is None and error.errno not in _FULL:
            raise
        let_rank_zero_speak(rank)
        report(describe_os_error(error, "standard output"), ExitCode.BAD_INPUT, rank=rank)
        return ExitCode.BAD_INPUT
    except KeyboardInterrupt:
        if rank == 0:
            print(f"interrupted; {describe_continuation(config)}", file=sys.stderr)
        return _INTERRUPTED


def is_training(stage_name: str, argv: Sequence[str], world_size: int) -> bool:
    """Return whether the command line trains, not only prints; raises BadInput where `main` would refuse it."""
    arguments = parse_arguments(argv, stage_name)
    if arguments.help or arguments.dry_run:
        return False
    environment = Environment(world_size=world_size, local_world_size=world_size, is_restart=is_restart(os.environ))
    _check(*_load(arguments, stage_name), stage_name, environment, detect_platform_name())
    return True


def _print_help(stage_name: str) -> None:
    from configs.plan.show import field_help

    print(usage(stage_name))
    print("\nfields of the config:\n")
    print(field_help(stage_name))


def _load(arguments: Arguments, stage_name: str) -> tuple[Config, list[str]]:
    """Return the config, and what is wrong with it where the rest of it can be judged all the same."""
    from configs.load import read_config

    assert arguments.config_path is not None  # parse_arguments refuses a command line without one
    config, problems = read_config(arguments.config_path, arguments.overrides, stage_name)
    if config is None:
        raise BadInput("\n".join(problems))
    return config, problems


def _check(
    config: Config, problems: list[str], stage_name: str, environment: Environment, platform_name: PlatformName
) -> None:
    """Raise BadInput with everything that would end the run as soon as it began, one problem a line."""
    from trainer.data.presence import find_data_problems

    problems = problems + config_problems(
        config, environment.world_size, platform_name, has_te=has_transformer_engine()
    )
    problems += machine_problems(config, platform_name)
    # What was queued again may still be finishing a checkpoint: under the run's lock it is looked at again anyway.
    start = [] if environment.is_restart else start_problems(config, stage_name)
    _, others = find_others(config, environment.world_size, platform_name)
    # a closed path is not looked into
    problems += path_problems(config) or [*find_data_problems(config), *start, *others]
    if problems:
        raise BadInput("\n".join(problems))
    problem = memory_problem(config, environment, platform_name)
    if problem is not None:
        raise BadInput(problem)


def _train(config: Config, stage_name: str, environment: Environment, platform_name: PlatformName) -> int:
    """Hand over to the trainer and turn what it raises into one sentence and an exit code."""
    os.environ.update(environment.as_variables())
    try:
        from trainer.report.log import start_console

        start_console(environment.rank)
        slow = slowness(config, platform_name)
        if slow is not None:
            log.warning(slow)
        from trainer.run.run import run

        return run(config, stage_name, environment, platform_name)
    except ShardwrightError as error:
        failure: ShardwrightError = error
    except Exception as error:
        cause = describe_cause(error, config, environment.world_size)
        if cause is not None:
            failure = BadInput(f"{cause}; {describe_continuation(config)}")
        elif is_peer_loss(error, load_platform(platform_name).is_peer_failure):
            failure = PeerLost(describe_peer_loss(error, config.parallel.timeout_seconds))
        else:
            traceback.print_exc()
            report(f"{type(error).__name__}: {error}", 1, rank=environment.rank)
            return 1
    goes_on = isinstance(failure, (NonFinite, PeerLost))
    sentence = f"{failure}; {describe_continuation(config)}" if goes_on else str(failure)
    let_rank_zero_speak(environment.rank)
    report(sentence, failure.exit_code, rank=environment.rank)
    return failure.exit_code
