"""A run's checkpoints as Hugging Face models, under `hf/` in their directories (`checkpoint.export_hf`)."""

from __future__ import annotations

import logging
from pathlib import Path

from configs.stages import Config
from parallel.collectives import on_rank_zero
from parallel.mesh import Mesh
from trainer.checkpoint.layout import EXPORT, checkpoints_dir
from trainer.hf.export_source import describe_source
from trainer.hf.exporting import export_checkpoint

log = logging.getLogger(__name__)


def lacks_export(checkpoint: Path, run_dir: Path) -> bool:
    """Return whether a kill kept the run's own checkpoint from being exported. Collective: all ranks must call this."""
    is_own = checkpoint.parent == checkpoints_dir(run_dir).resolve()
    return on_rank_zero(lambda: is_own and not (checkpoint / EXPORT).exists())


def export_run_checkpoint(config: Config, mesh: Mesh, checkpoint: Path) -> None:
    """Write a checkpoint as a Hugging Face model too. Collective: all ranks of the world must call this."""
    report = export_checkpoint(
        describe_source(checkpoint),
        checkpoint / EXPORT,
        dtype=None,
        rank=mesh.rank,
        world_size=mesh.world_size,
        on_bytes=lambda done: None,
    )
    log.info("exported %s (%.1f s)", checkpoint / EXPORT, report.seconds)
    for note in report.notes:
        log.warning("%s: %s", checkpoint / EXPORT, note)
    if report.non_finite:
        log.warning("%s holds NaN or infinite values: %s", checkpoint / EXPORT, report.non_finite)
