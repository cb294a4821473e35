"""Seeds of weights and dropout for a layout; the data order has its own, independent of the layout."""

from __future__ import annotations

import random
from typing import cast

import numpy as np
import torch

from parallel.platform.base import Platform


def seed_everything(seed: int, pp_rank: int, ep_size: int) -> None:
    """Seed Python, NumPy, torch and Megatron-Core's per-axis trackers; pipeline stages differ, tp ranks by tracker.

    The tracker of experts adds 100 for each ep rank, so stages lie further apart than all ep ranks of one.
    """
    from megatron.core import tensor_parallel

    stage_seed = seed + 100 * ep_size * pp_rank
    random.seed(stage_seed)
    np.random.seed(stage_seed % 2**32)
    torch.manual_seed(stage_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(stage_seed, force_reset_rng=True)


def get_rng_state(platform: Platform) -> dict[str, object]:
    """Return the states of all generators of this rank."""
    from megatron.core import tensor_parallel

    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "device": platform.get_rng_state(),
        "trackers": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def set_rng_state(platform: Platform, state: dict[str, object]) -> None:
    """Restore what `get_rng_state` returned; generators of another kind of device go on from this start's seeds."""
    from megatron.core import tensor_parallel

    random.setstate(state["python"])  # type: ignore[arg-type]
    np.random.set_state(state["numpy"])  # type: ignore[arg-type]
    torch.set_rng_state(state["torch"])  # type: ignore[arg-type]
    device = cast(torch.Tensor, state["device"])
    if device.numel() != platform.get_rng_state().numel():  # a GPU's is a seed and an offset, a CPU's a whole table
        return
    platform.set_rng_state(device)
    tensor_parallel.get_cuda_rng_tracker().set_states(state["trackers"])
