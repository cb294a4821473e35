"""Which rank this process is and where the ranks meet. Plain data, torch-free, filled in by `launch`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Environment:
    """Place of this process among the ranks of the run, as `torch.distributed`'s `env://` rendezvous wants it."""

    rank: int = 0
    """Rank of this process over all nodes."""
    world_size: int = 1
    """Number of ranks over all nodes."""
    local_rank: int = 0
    """Rank on this node; chooses the device."""
    local_world_size: int = 1
    """Number of ranks on this node."""
    master_addr: str = "127.0.0.1"
    """Host of rank 0."""
    master_port: int = 29500
    """Port on that host where the ranks meet."""
    launcher: str = "single"
    """Who started the ranks: torchrun, slurm, local or single."""
    is_restart: bool = False
    """Whether the launcher or the scheduler starts this job again after it was stopped or failed."""

    def as_variables(self) -> dict[str, str]:
        """Return the environment variables that `init_process_group(init_method="env://")` reads."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }
