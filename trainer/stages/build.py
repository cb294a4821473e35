"""Stage name -> how it is built; a new stage adds one entry, and its config class to `configs.stages`."""

from __future__ import annotations

from trainer.stages.base import StageKind
from trainer.stages.pretrain import build_pretrain

STAGES: dict[str, StageKind] = {"pretrain": StageKind(build_pretrain)}
