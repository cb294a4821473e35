"""Process groups -> one frozen `Mesh`; the only user of Megatron-Core's `parallel_state`."""

from __future__ import annotations

import contextlib
import datetime
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from configs.errors import BadInput
from configs.stages import Config
from parallel.control import open_control_group
from parallel.platform.base import Platform


@dataclass(frozen=True)
class Mesh:
    """Sizes, coordinates and groups of this rank; every group is a `torch.distributed.ProcessGroup`."""

    platform: Platform
    device: torch.device
    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    vpp_size: int
    cp_rank: int
    cp_size: int
    dp_rank: int
    dp_size: int
    ep_rank: int
    ep_size: int
    tp_group: Any
    pp_group: Any
    cp_group: Any
    dp_group: Any
    dp_cp_group: Any
    expert_dp_group: Any
    """Ranks with the same experts."""
    stage_group: Any
    """All ranks of this rank's pipeline stage: tp x cp x dp."""

    @property
    def is_first_pp_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.pp_rank == 0

    @property
    def is_last_pp_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return self.pp_rank == self.pp_size - 1

    def sizes(self) -> dict[str, int]:
        """Return the sizes of the axes by name."""
        return {
            "world": self.world_size,
            "tp": self.tp_size,
            "pp": self.pp_size,
            "vpp": self.vpp_size,
            "cp": self.cp_size,
            "ep": self.ep_size,
            "dp": self.dp_size,
        }

    def coordinates(self) -> str:
        """Return this rank and its place on the axes, for logs and errors."""
        return f"rank {self.rank} ({self.place()})"

    def place(self) -> str:
        """Return this rank's place on the axes."""
        return (
            f"tp {self.tp_rank}/{self.tp_size}, cp {self.cp_rank}/{self.cp_size}, dp {self.dp_rank}/{self.dp_size}, "
            f"pp {self.pp_rank}/{self.pp_size}, ep {self.ep_rank}/{self.ep_size}"
        )


def init_world(platform: Platform, config: Config, *, rank: int, world_size: int, init_method: str) -> None:
    """Join the world's process group. Collective: all ranks of the world must call this."""
    try:
        dist.init_process_group(
            platform.backend if world_size > 1 else platform.lone_backend,
            init_method=init_method,
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=config.parallel.timeout_seconds),
        )
    except (dist.DistNetworkError, ValueError) as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = str(error).strip().splitlines()[0]
        if "EADDRINUSE" not in reason and "port must" not in reason:
            raise  # a rank that died or did not come in time
        raise BadInput(
            f"MASTER_ADDR:MASTER_PORT {place}: the ranks cannot meet there ({reason}); choose a free port."
        ) from error
    open_control_group(platform.control_backend)


def build_mesh(platform: Platform, device: torch.device, config: Config) -> Mesh:
    """Create the process groups of the configured layout. Collective: all ranks of the world must call this."""
    from megatron.core import parallel_state

    sizes = config.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=sizes.tp,
        pipeline_model_parallel_size=sizes.pp,
        virtual_pipeline_model_parallel_size=sizes.vpp if sizes.vpp > 1 else None,
        context_parallel_size=sizes.cp,
        hierarchical_context_parallel_sizes=None
        if sizes.cp_inner is None
        else [sizes.cp_inner, sizes.cp // sizes.cp_inner],
        expert_model_parallel_size=sizes.ep,
        expert_tensor_parallel_size=sizes.etp,
        distributed_timeout_minutes=max(1, sizes.timeout_seconds // 60),
        create_gloo_process_groups=False,
    )
    return Mesh(
        platform=platform,
        device=device,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=sizes.tp,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=sizes.pp,
        vpp_size=sizes.vpp,
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=sizes.cp,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        ep_size=sizes.ep,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        cp_group=parallel_state.get_context_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        expert_dp_group=parallel_state.get_expert_data_parallel_group(),
        stage_group=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True),
    )


def destroy_mesh() -> None:
    """Forget the layout's groups, so that another layout can be built in the same process."""
    from megatron.core import parallel_state

    with contextlib.suppress(AssertionError):
        parallel_state.destroy_model_parallel()
