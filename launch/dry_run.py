"""`--dry-run`: what a run of a config would be, perhaps on other machines than this one, and what is wrong with it.

Torch-free; writes nothing. What the config names and this machine has is checked too, what it lacks is told.
"""

from __future__ import annotations

import math
import os

from configs.errors import BadInput, ExitCode
from configs.stages import Config
from launch.checks import (
    config_problems,
    data_problems,
    find_others,
    machine_problems,
    path_problems,
    slowness,
    start_problems,
)
from parallel.environment import Environment
from parallel.platform import CLUSTER_PLATFORM, PlatformName, detect_platform_name, has_transformer_engine


def dry_run(
    config: Config, problems: list[str], stage_name: str, world_size: int | None, environment: Environment
) -> ExitCode:
    """Print the resolved config and what follows from it; raise BadInput for what no machine could run.

    `problems` are known already. `world_size` None plans for the launcher's ranks, else for the fewest that the layout
    has.
    """
    from configs.plan.derive import derive_layout
    from configs.plan.show import describe

    is_fewest = world_size is None and environment.launcher == "single"
    if world_size is None:
        world_size = _fewest_ranks(config) if is_fewest else environment.world_size
    platform_name = detect_platform_name()
    problems = problems + plan_problems(config, stage_name, world_size, CLUSTER_PLATFORM)
    others, misfits = find_others(config, world_size, CLUSTER_PLATFORM)
    if problems or misfits:
        raise BadInput("\n".join([*problems, *misfits]))
    order = _order_of_data(config)
    if environment.rank == 0:
        print(describe(config, derive_layout(config, world_size), is_fewest=is_fewest, others=others))
        for sentence in order:
            print(f"order of data    {sentence}")
        here = config_problems(config, world_size, platform_name, has_te=has_transformer_engine())
        for problem in here + machine_problems(config, platform_name):
            print(f"cannot run here  {problem}")
        slow = slowness(config, platform_name)
        if slow is not None:
            print(f"slow here        {slow}")
    return ExitCode.DONE


def plan_problems(
    config: Config, stage_name: str, world_size: int, platform_name: PlatformName, *, is_start_to_come: bool = False
) -> list[str]:
    """Return every reason why no machines of a platform could run this on `world_size` ranks, one sentence each.

    With `is_start_to_come` another run will have left the weights that it starts with when it begins.
    """
    problems = config_problems(config, world_size, platform_name, has_te=platform_name == CLUSTER_PLATFORM)
    closed = path_problems(config)
    # what may not be looked at is told once, and not looked at
    found = start_problems(config, stage_name, is_start_to_come=is_start_to_come)
    return problems + (closed or [*data_problems(config), *found])


def _order_of_data(config: Config) -> list[str]:
    """Return what becomes of documents that are packed or drawn by length, where all of them are on this machine.

    Raises BadInput where that cannot be. Of ten million documents it takes seconds; what is not asked for, nothing.
    """
    data = config.data
    is_plain = data.packing == "concat" and all(source.long_document_share is None for source in data.train)
    if is_plain or not data.train or not all(os.path.exists(f"{source.path}.idx") for source in data.train):
        return []
    from configs.plan.derive import consumed_samples_after
    from trainer.data.blend import open_blend

    blend = open_blend(data.train, config.train.seq_len, config.run.seed, data.packing)
    return list(blend.describe_order(consumed_samples_after(config.train, config.train.num_steps)))


def _fewest_ranks(config: Config) -> int:
    """Return the smallest world the layout fits: tp*cp and ep*etp each divide the ranks of a pipeline stage."""
    sizes = config.parallel
    return sizes.pp * math.lcm(sizes.tp * sizes.cp, sizes.ep * (sizes.etp or sizes.tp) if sizes.ep > 1 else 1)
