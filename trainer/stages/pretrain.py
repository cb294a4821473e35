"""Pretraining: next-token prediction on packed documents. `launch/pretrain.py` runs it."""

from __future__ import annotations

from trainer.engine.build import POLICY
from trainer.engine.engine import Engine
from trainer.evaluate.validation import Evaluator
from trainer.stages.base import StageContext
from trainer.stages.next_token import NextTokenObjective
from trainer.stages.training import TrainingStage


def build_pretrain(context: StageContext) -> TrainingStage:
    """Return the stage that reads the blend in order and minimises the mean next-token loss."""
    corpus, mesh, engine = context.corpus, context.mesh, context.models[POLICY]
    assert isinstance(engine, Engine)
    place = {"dp_rank": mesh.dp_rank, "dp_size": mesh.dp_size}
    evaluator = Evaluator(corpus.build_validation_readers(**place))
    return TrainingStage("pretrain", engine, corpus.build_reader(**place), NextTokenObjective(), evaluator)
