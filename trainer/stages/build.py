"""Stage name -> stage object; a new stage adds one entry."""

from __future__ import annotations

from collections.abc import Callable

from parallel.mesh import Mesh
from trainer.data.corpus import Corpus
from trainer.stages.base import Stage
from trainer.stages.pretrain import PretrainStage


def _build_pretrain(corpus: Corpus, mesh: Mesh) -> Stage:
    return PretrainStage(corpus.build_reader(dp_rank=mesh.dp_rank, dp_size=mesh.dp_size))


STAGES: dict[str, Callable[[Corpus, Mesh], Stage]] = {"pretrain": _build_pretrain}


def build_stage(name: str, corpus: Corpus, mesh: Mesh) -> Stage:
    """Return the stage of an entry point of `launch/`."""
    return STAGES[name](corpus, mesh)
