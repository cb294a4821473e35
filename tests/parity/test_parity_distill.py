"""Distillation on packed rows gives on every layout the updates of the written-out divergences, sample by sample."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from configs.sections.distill import DistillSection
from configs.stages import Config
from tests.parity.conftest import TOLERANCE, assert_equal_runs
from tests.parity.test_parity_output_loss import in_pieces
from tests.parity.test_parity_preference import PreferenceRecord, make_record
from tests.parity.test_parity_sft import LAYOUTS as LAYOUTS_OF_SFT
from tests.parity.test_parity_sft import MOE, PACKED, RandomChats, read_alone
from tests.pool import Place
from tests.small_runs import SEQ_LEN, VOCAB_SIZE, open_engine

# One update each, one after the other.
METHODS: list[dict[str, Any]] = [
    {"beta": 0.0},
    {"beta": 0.4, "top_k": 6},
    {"beta": 1.0, "temperature": 2.0, "label_weight": 0.3},
    {"beta": 0.0, "temperature": 1.5, "top_k": 20, "label_weight": 0.5},
]
# Another depth and width than the student's, and its own output layer.
TEACHER = {"num_layers": 8, "hidden_size": 32, "ffn_hidden_size": 96, "num_attention_heads": 2, "tie_embeddings": True}
RATE = 3e-3
LAYOUTS = {name: layout for name, layout in LAYOUTS_OF_SFT.items() if name != "one"} | {"tp2": (2, {"tp": 2}, {})}


def config_of(method: dict[str, Any]) -> Any:
    """Return what objectives read of a config of distillation."""
    from types import SimpleNamespace

    from configs.sections.sft import SftSection

    return SimpleNamespace(sft=SftSection(), distill=DistillSection.model_validate({"teacher": "made-up", **method}))


@contextmanager
def open_both(place: Place, config: Config, run_dir: str, teacher_dir: str) -> Iterator[tuple[Any, Any]]:
    """Yield the engine and the teacher with the weights of their seeds."""
    from configs.sections.model import ModelConfig
    from trainer.checkpoint.layout import resolve_checkpoint
    from trainer.checkpoint.load import warm_start
    from trainer.checkpoint.manifest import read_manifest
    from trainer.engine.build import ModelPlan, build_models

    checkpoint = resolve_checkpoint(teacher_dir)
    model = ModelConfig.model_validate(read_manifest(checkpoint).config["model"])
    with open_engine(place, config) as engine:
        plan = ModelPlan(config.model_copy(update={"model": model}), is_trained=False)
        teacher = build_models({"teacher": plan}, engine.mesh)["teacher"]
        warm_start(engine, resolve_checkpoint(run_dir))
        warm_start(teacher, checkpoint)
        yield engine, teacher


class WrittenOut:
    """GKD's equations with the whole of both distributions, in float64."""

    mean_names = ("divergence",)

    def __init__(self, section: DistillSection) -> None:
        self._section = section

    def forward(self, model: Any, batch: Any) -> Any:
        """Return the student's logits."""
        return model(batch.tokens, batch.position_ids, None)

    def count(self, batch: Any) -> Any:
        """Return the trained tokens."""
        return (batch.loss_mask > 0).sum(dtype=batch.labels.int().dtype)

    def loss(self, output: Any, batch: Any) -> Any:
        """Return the loss of one sample."""
        import torch

        from trainer.losses.loss import Loss, Mean

        section = self._section
        logits, taught = output[..., :VOCAB_SIZE].double(), batch.columns["logits"].double()
        q, p = ((one / section.temperature).softmax(-1) for one in (logits, taught))
        if section.top_k is not None:
            order = p.argsort(-1, descending=True)
            p, q = (one.gather(-1, order) for one in (p, q))
            k = section.top_k
            p, q = (torch.cat([one[..., :k], one[..., k:].sum(-1, keepdim=True)], -1) for one in (p, q))
        if section.beta == 0:
            each = (p * (p / q).log()).sum(-1)
        elif section.beta == 1:
            each = (q * (q / p).log()).sum(-1)
        else:
            m = section.beta * p + (1 - section.beta) * q
            each = section.beta * (p * (p / m).log()).sum(-1) + (1 - section.beta) * (q * (q / m).log()).sum(-1)
        labels = -logits.log_softmax(-1).gather(-1, batch.labels.unsqueeze(-1)).squeeze(-1)
        losses = (1 - section.label_weight) * section.temperature**2 * each + section.label_weight * labels
        divergence = Mean((each * batch.loss_mask).sum().detach(), self.count(batch))
        return Loss((losses * batch.loss_mask).sum(), {"divergence": divergence})


def update_alone(place: Place, config: Config, run_dir: str, teacher_dir: str) -> PreferenceRecord:
    """Update by the written-out divergences on samples one by one."""
    with open_both(place, config, run_dir, teacher_dir) as (engine, teacher):
        batches = [
            replace(batch, columns={"logits": teacher.compute_logits(batch.tokens)}) for batch in read_alone("token")
        ]
        objectives = [WrittenOut(config_of(method).distill) for method in METHODS]
        return make_record(engine, [engine.train_step(batches, one, RATE) for one in objectives])


def update_in_rows(place: Place, config: Config, run_dir: str, teacher_dir: str) -> PreferenceRecord:
    """Update as the stage does, logits in pieces."""
    from trainer.data.blend import Blend
    from trainer.data.packed_source import SOURCES
    from trainer.data.reader import BatchReader
    from trainer.rl.teacher import LiveTeacher
    from trainer.stages.distill import DistillObjective

    with open_both(place, config, run_dir, teacher_dir) as (engine, model):
        source: Any = SOURCES["best_fit"](RandomChats(), SEQ_LEN, seed=1)  # type: ignore[arg-type]
        size = config.train.global_batch_size
        assert source.num_samples == size
        mesh, results = engine.mesh, []
        for method in METHODS:
            section = config_of(method).distill
            teacher = LiveTeacher(model, section.temperature, section.top_k)
            reader = BatchReader(
                Blend([source], [1.0]),
                micro_batch_size=config.train.micro_batch_size,
                dp_rank=mesh.dp_rank,
                dp_size=mesh.dp_size,
                global_batch_size_at=lambda consumed: size,
                vocab_size=VOCAB_SIZE,
            )
            batches = teacher.annotate(engine, reader.read_step())
            reader.close()
            with in_pieces(place, config):
                results.append(engine.train_step(batches, DistillObjective(config_of(method), teacher), RATE))
        return make_record(engine, results)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_updates_in_packed_rows_equal_samples_alone(judge, layout):
    world, parallel, model = LAYOUTS[layout]
    teacher = str(judge.seed(TEACHER | ({"moe": MOE} if "moe" in model else {})))
    sections: dict[str, Any] = {"model": model}
    alone = judge.run(1, {}, teacher, case=update_alone, **sections)
    rows = judge.run(world, parallel, teacher, case=update_in_rows, **sections, data=PACKED)
    assert_equal_runs(rows, alone)
    assert np.ptp(alone.losses) > 0.01
    for found, expected in zip(rows.metrics, alone.metrics, strict=True):
        assert found["divergence"] == pytest.approx(expected["divergence"], rel=TOLERANCE)
