"""Fine-tuning on packed rows gives on every layout the losses and updates of each sample alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from configs.sections.sft import SftSection
from configs.stages import Config
from tests.parity.conftest import assert_equal_runs
from tests.parity.test_parity_packing import RandomDocuments, train_on
from tests.pool import Place
from tests.small_runs import SEQ_LEN, VOCAB_SIZE, RunRecord

LENGTHS = [33, 30, 28, 25, 20, 18, 17, 17, 15, 12, 9, 9, 7, 5, 3, 2]
PACKED = {"packing": "best_fit", "document_mask": True}
MOE = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 64, "balancing": "none"}  # which padding would take part in
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one": (1, {}, {}),
    "cp2": (2, {"cp": 2}, {}),
    "tp2_sp": (2, {"tp": 2, "sp": True}, {}),
    "pp2_vpp2": (2, {"pp": 2, "vpp": 2}, {}),
    "dp2": (2, {}, {}),
    "ep2": (2, {"ep": 2}, {"moe": MOE}),
}


class RandomChats(RandomDocuments):
    """Samples of random tokens, of which runs are trained: of some the end alone, of some nearly all."""

    def __init__(self) -> None:
        super().__init__(LENGTHS)
        self.masks = [np.zeros(length, dtype=np.uint8) for length in LENGTHS]
        for mask in self.masks:
            start = int(self.random.integers(1, len(mask)))
            mask[start : start + int(self.random.integers(1, len(mask)))] = 1

    def read_mask(self, document: int, start: int, length: int) -> np.ndarray:
        """Return which of its tokens are trained."""
        return self.masks[document][start : start + length]


def read_alone(weighting: str) -> Iterator[Any]:
    """Yield every sample as a batch of its own, plain causal attention over its own length; weights by hand."""
    import torch

    from trainer.data.batch import Batch

    chats = RandomChats()
    for ids, mask in zip(chats.documents, chats.masks, strict=True):
        tokens, labels, trained = (
            torch.from_numpy(part.astype(np.int64))[None] for part in (ids[:-1], ids[1:], mask[1:])
        )
        columns = {}
        if weighting == "sample":
            ends = torch.zeros(tokens.shape, dtype=torch.int32)
            ends[0, 0] = 1
            columns = {"weights": trained / trained.sum(), "ends": ends}
        positions = torch.arange(tokens.shape[1])[None]
        yield Batch(tokens, labels, positions, trained.float(), columns=columns, sample_ids=(0,))


def objective_of(weighting: str) -> Any:
    """Return the objective of a weighting; samples that weigh alike have smoothed labels too."""
    from trainer.stages.sft import ConversationObjective

    smoothing = 0.1 if weighting == "sample" else 0.0
    return ConversationObjective(SftSection(weighting=weighting, label_smoothing=smoothing))  # type: ignore[arg-type]


def run_alone(place: Place, config: Config, run_dir: str, weighting: str) -> RunRecord:
    """Train on samples one by one."""

    class Alone:
        def read_step(self) -> list[Any]:
            return list(read_alone(weighting))

        def close(self) -> None:
            pass

    return train_on(place, config, run_dir, lambda engine: Alone(), objective_of(weighting))


def run_rows(place: Place, config: Config, run_dir: str, weighting: str) -> RunRecord:
    """Train on packed or padded rows (`data.packing`), as the reader deals them."""
    from trainer.data.blend import Blend
    from trainer.data.packed_source import SOURCES
    from trainer.data.reader import BatchReader

    objective = objective_of(weighting)

    def read(engine: Any) -> BatchReader:
        source: Any = SOURCES[config.data.packing](RandomChats(), SEQ_LEN, seed=1)  # type: ignore[arg-type]
        assert source.num_samples == config.train.global_batch_size
        return BatchReader(
            Blend([source], [1.0]),
            micro_batch_size=config.train.micro_batch_size,
            dp_rank=engine.mesh.dp_rank,
            dp_size=engine.mesh.dp_size,
            global_batch_size_at=lambda consumed: config.train.global_batch_size,
            vocab_size=VOCAB_SIZE,
            finish=objective.finish,
        )

    return train_on(place, config, run_dir, read, objective)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("weighting", ["token", "sample"])
def test_packed_rows_equal_samples_alone(judge, name, weighting):
    world, parallel, model = LAYOUTS[name]
    sections = {"model": model, "train": {"num_steps": 3}}
    alone = judge.run(1, {}, weighting, case=run_alone, **sections)
    assert_equal_runs(judge.run(world, parallel, weighting, case=run_rows, **sections, data=PACKED), alone)


@pytest.mark.parametrize("weighting", ["token", "sample"])
def test_padded_rows_equal_samples_alone(judge, weighting):
    alone = judge.run(1, {}, weighting, case=run_alone, model={}, train={"num_steps": 3})
    train, data = {"num_steps": 3, "global_batch_size": len(LENGTHS)}, PACKED | {"packing": "padded"}
    assert_equal_runs(judge.run(2, {}, weighting, case=run_rows, model={}, train=train, data=data), alone)
