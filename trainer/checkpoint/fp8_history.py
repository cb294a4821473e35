"""What delayed FP8 scaling remembers, in checkpoints: a tensor for each linear, the same on all ranks of a stage."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import load_tensors_metadata
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from trainer.engine.engine import Engine
from trainer.model.fp8.history import AmaxHistory, Site

log = logging.getLogger(__name__)


def build_fp8_state(engine: Engine) -> dict[str, ShardedTensor]:
    """Return the histories of this rank's pipeline stage, `[experts or 1, operands, steps]` by linear."""
    history = _history_of(engine)
    if history is None:
        return {}
    return {key: _shard(engine, key, history.values[rows.start : rows.stop]) for key, rows in _rows_of(history).items()}


def request_fp8_state(engine: Engine, checkpoint: Path) -> dict[str, ShardedTensor]:
    """Return what to load: the histories that the checkpoint has, in the length they were saved with."""
    history = _history_of(engine)
    if history is None:
        return {}
    saved = load_tensors_metadata(str(checkpoint))
    wanted = _rows_of(history)
    lengths = {key: saved[key].global_shape[-1] for key in wanted if key in saved}
    if not lengths:
        log.info("%s has no history of FP8 scales: the first step scales by what it sees", checkpoint)
    num_operands = history.values.shape[1]
    return {
        key: _shard(engine, key, torch.zeros(len(wanted[key]), num_operands, length, device=history.values.device))
        for key, length in lengths.items()
    }


def set_fp8_state(engine: Engine, loaded: Mapping[str, torch.Tensor]) -> None:
    """Put loaded histories in place, cut or filled up with zeros where `amax_history_len` has changed."""
    history = _history_of(engine)
    if history is None:
        return
    rows, length = _rows_of(history), history.values.shape[-1]
    for key, values in loaded.items():
        kept = min(length, values.shape[-1])
        history.values[rows[key].start : rows[key].stop, :, :kept] = values[..., :kept]
    history.load()


def _history_of(engine: Engine) -> AmaxHistory | None:
    return None if engine.fp8 is None else engine.fp8.history


def _rows_of(history: AmaxHistory) -> dict[str, range]:
    """Return the rows of each linear, all experts of a layer together, by its key in checkpoints."""

    def linear(site: Site) -> str:
        return f"fp8.amax_history.layers.{site.layer}.{site.name}"

    found = {}
    for key, sites in groupby(history.sites, key=linear):
        rows = [history.sites[site] for site in sites]
        found[key] = range(rows[0], rows[-1] + 1)
    return found


def _shard(engine: Engine, key: str, values: torch.Tensor) -> ShardedTensor:
    mesh: Any = engine.mesh
    replica = (0, mesh.tp_rank, dist.get_rank(mesh.dp_cp_group))
    return ShardedTensor.from_rank_offsets(key, values.contiguous(), replica_id=replica)
