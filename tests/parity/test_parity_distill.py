"""Distillation on packed rows gives on every layout the updates of the written-out divergences, sample by sample."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from configs.roles import SecondModel
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
def open_both(
    place: Place, config: Config, run_dir: str, teacher_dir: str, *, is_whole: bool = False
) -> Iterator[tuple[Any, Any]]:
    """Yield the engine and the teacher with the weights of their seeds, `is_whole` with all ids of another's number."""
    from configs.sections.model import ModelConfig
    from trainer.checkpoint.layout import resolve_checkpoint
    from trainer.checkpoint.load import warm_start
    from trainer.checkpoint.manifest import read_manifest
    from trainer.engine.build import ModelPlan, build_models
    from trainer.run.second_models import look_at

    checkpoint = resolve_checkpoint(teacher_dir)
    model = ModelConfig.model_validate(read_manifest(checkpoint).config["model"])
    if not is_whole and model.vocab_size != config.model.vocab_size:
        second = SecondModel("distill.teacher", teacher_dir)
        model = look_at(second, config).model
    with open_engine(place, config) as engine:
        plan = ModelPlan(config.model_copy(update={"model": model}), is_trained=False)
        teacher = build_models({"teacher": plan}, engine.mesh)["teacher"]
        warm_start(engine, resolve_checkpoint(run_dir))
        warm_start(teacher, checkpoint, read_manifest(checkpoint).config["model"]["vocab_size"])
        yield engine, teacher


class WrittenOut:
    """GKD's equations with the whole of both distributions over the ids that both have, in float64."""

    mean_names = ("divergence",)

    def __init__(self, section: DistillSection, num_ids: int) -> None:
        self._section, self._num_ids = section, num_ids

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
        logits, taught = output.double(), batch.columns["logits"].double()  # of ids that are none the smallest number
        both = (one[..., : self._num_ids] / section.temperature for one in (logits, taught))
        q, p = (one.softmax(-1) for one in both)
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
    with open_both(place, config, run_dir, teacher_dir, is_whole=True) as (engine, teacher):
        num_ids = min(config.model.vocab_size, teacher.config.model.vocab_size)
        batches = [
            replace(batch, columns={"logits": teacher.compute_logits(batch.tokens)}) for batch in read_alone("token")
        ]
        objectives = [WrittenOut(config_of(method).distill, num_ids) for method in METHODS]
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
        mesh, num_ids, results = engine.mesh, model.config.model.vocab_size, []
        for method in METHODS:
            section = config_of(method).distill
            teacher = LiveTeacher(model, section.temperature, section.top_k, num_ids)
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
    _assert_equal(rows, alone)


def _assert_equal(rows: Any, alone: Any) -> None:
    assert_equal_runs(rows, alone)
    assert np.ptp(alone.losses) > 0.01
    for found, expected in zip(rows.metrics, alone.metrics, strict=True):
        assert found["divergence"] == pytest.approx(expected["divergence"], rel=TOLERANCE)


@pytest.mark.parametrize(("ids_more", "parallel"), [({}, {"tp": 2}), ({"vocab_size": 450}, {"tp": 2, "pp": 2})])
def test_a_teacher_of_more_or_fewer_ids_is_compared_over_those_of_both(judge, ids_more, parallel):
    """As with published models of one family, whose vocabularies are padded to different sizes."""
    teacher = str(judge.seed(TEACHER | ({} if ids_more else {"vocab_size": 450})))
    alone = judge.run(1, {}, teacher, case=update_alone, model=ids_more)
    world = parallel["tp"] * parallel.get("pp", 1)
    _assert_equal(judge.run(world, parallel, teacher, case=update_in_rows, model=ids_more, data=PACKED), alone)
