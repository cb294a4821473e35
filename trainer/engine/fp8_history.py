"""What delayed FP8 scaling remembers, in checkpoints: a tensor for each linear, the same on all ranks of a stage."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from itertools import groupby

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from parallel.mesh import Mesh
from trainer.engine.parts import SavedState
from trainer.model.fp8.history import AmaxHistory, Site

log = logging.getLogger(__name__)


def build_history_state(history: AmaxHistory | None, mesh: Mesh) -> dict[str, ShardedTensor]:
    """Return the histories of this rank's pipeline stage, `[experts or 1, operands, steps]` by linear."""
    if history is None:
        return {}
    return {key: _shard(mesh, key, history.values[rows.start : rows.stop]) for key, rows in _rows_of(history).items()}


def request_history_state(history: AmaxHistory | None, mesh: Mesh, saved: SavedState) -> dict[str, ShardedTensor]:
    """Return what to load: the histories that the checkpoint has, in the length they were saved with."""
    if history is None:
        return {}
    wanted = _rows_of(history)
    lengths = {key: saved.shapes[key][-1] for key in wanted if key in saved.shapes}
    if not lengths:
        log.info("the checkpoint has no history of FP8 scales: the first step scales by what it sees")
    num_operands = history.values.shape[1]
    return {
        key: _shard(mesh, key, torch.zeros(len(wanted[key]), num_operands, length, device=history.values.device))
        for key, length in lengths.items()
    }


def load_history(history: AmaxHistory | None, loaded: Mapping[str, torch.Tensor]) -> None:
    """Put loaded histories in place, cut or filled up with zeros where `amax_history_len` has changed."""
    if history is None:
        return
    rows, length = _rows_of(history), history.values.shape[-1]
    for key, values in loaded.items():
        kept = min(length, values.shape[-1])
        history.values[rows[key].start : rows[key].stop, :, :kept] = values[..., :kept]
    history.load()


def _rows_of(history: AmaxHistory) -> dict[str, range]:
    """Return the rows of each linear, all experts of a layer together, by its key in checkpoints."""

    def linear(site: Site) -> str:
        return f"fp8.amax_history.layers.{site.layer}.{site.name}"

    found = {}
    for key, sites in groupby(history.sites, key=linear):
        rows = [history.sites[site] for site in sites]
        found[key] = range(rows[0], rows[-1] + 1)
    return found


def _shard(mesh: Mesh, key: str, values: torch.Tensor) -> ShardedTensor:
    replica = (0, mesh.tp_rank, dist.get_rank(mesh.dp_cp_group))
    return ShardedTensor.from_rank_offsets(key, values.contiguous(), replica_id=replica)
