"""Rows of packed documents give the losses, gradients and weights of each document alone in a row of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from configs.stages import Config
from tests.parity.conftest import assert_equal_runs
from tests.parity.test_parity_context import MODELS as MODELS_OF_CONTEXT
from tests.pool import Place
from tests.small_runs import SEQ_LEN, VOCAB_SIZE, RunRecord, open_engine, record_run, train_steps

# Eight rows an epoch, so that every step reads every document: a split one, one that fills a row, one that is a token
# longer, one of two tokens, and padding.
LENGTHS = [81, 33, 34, 2, 20, 9, 28, 3, 17, 15, 6, 12, 5]
PACKED = {"data": {"packing": "best_fit", "document_mask": True}}
LAYOUTS = {
    "one": (1, {}),
    "cp2": (2, {"cp": 2}),
    "cp2_ulysses": (2, {"cp": 2, "cp_attention": "ulysses"}),
    "tp2_sp": (2, {"tp": 2, "sp": True}),
    "pp2": (2, {"pp": 2}),
    "dp2": (2, {}),
}


class RandomDocuments:
    """Documents of random tokens, none of which ends them."""

    prefix = origin = identity = "made-up"
    meta = None

    def __init__(self, lengths: Sequence[int] = LENGTHS) -> None:
        self.lengths = np.array(lengths, dtype=np.int32)
        self.num_documents, self.num_tokens = len(lengths), sum(lengths)
        self.random = np.random.default_rng(5)
        self.documents = [self.random.integers(0, VOCAB_SIZE, length) for length in lengths]

    def read(self, document: int, start: int, length: int) -> np.ndarray:
        """Return tokens of a document."""
        return self.documents[document][start : start + length]

    def read_mask(self, document: int, start: int, length: int) -> np.ndarray | None:
        """Return which of its tokens are trained; None for all."""
        return None


def read_alone() -> Iterator[Any]:
    """Yield every piece of at most a row as a batch of its own, plain causal attention over its own length."""
    import torch

    from trainer.data.batch import Batch

    for document in RandomDocuments().documents:
        for start in range(0, len(document) - 1, SEQ_LEN):
            piece = torch.from_numpy(document[start : start + SEQ_LEN + 1])[None]
            tokens, labels = piece[:, :-1].contiguous(), piece[:, 1:].contiguous()
            positions = torch.arange(tokens.shape[1])[None]
            yield Batch(tokens, labels, positions, torch.ones(tokens.shape), sample_ids=(0,))


def train_on(place: Place, config: Config, run_dir: str, reader_of: Any, objective: Any = None) -> RunRecord:
    """Train from the seed checkpoint on what `reader_of` an engine reads, by default all of it."""
    from trainer.checkpoint.layout import resolve_checkpoint
    from trainer.checkpoint.load import warm_start
    from trainer.engine.state import TrainState
    from trainer.evaluate.validation import Evaluator
    from trainer.stages.next_token import NextTokenObjective
    from trainer.stages.training import TrainingStage

    with open_engine(place, config) as engine:
        warm_start(engine, resolve_checkpoint(run_dir))
        stage = TrainingStage("made-up", engine, reader_of(engine), objective or NextTokenObjective(), Evaluator({}))
        _, results = train_steps(stage, TrainState(), config.train.num_steps)
        stage.close()
        return record_run(engine, results)


def run_alone(place: Place, config: Config, run_dir: str, masks: str) -> RunRecord:
    """Train on documents one by one."""

    class Alone:
        def read_step(self) -> list[Any]:
            return list(read_alone())

        def close(self) -> None:
            pass

    return train_on(place, config, run_dir, lambda engine: Alone())


def run_packed(place: Place, config: Config, run_dir: str, masks: str) -> RunRecord:
    """Train on packed rows, as the reader deals them."""
    from trainer.data.blend import Blend
    from trainer.data.packed_source import PackedSource
    from trainer.data.reader import BatchReader

    def read(engine: Any) -> BatchReader:
        source: Any = PackedSource(RandomDocuments(), SEQ_LEN, seed=1)  # type: ignore[arg-type]
        assert source.num_samples == config.train.global_batch_size and source.padding_share > 0.01
        return BatchReader(
            Blend([source], [1.0]),
            micro_batch_size=config.train.micro_batch_size,
            dp_rank=engine.mesh.dp_rank,
            dp_size=engine.mesh.dp_size,
            global_batch_size_at=lambda consumed: config.train.global_batch_size,
            vocab_size=VOCAB_SIZE,
        )

    return train_on(place, config, run_dir, read)


@pytest.mark.parametrize("name", LAYOUTS)
def test_packed_rows_equal_documents_alone(judge, name):
    world, parallel = LAYOUTS[name]
    sections: dict[str, Mapping[str, Any]] = {"model": {}, "train": {"num_steps": 3}}
    alone = judge.run(1, {}, case=run_alone, **sections)
    assert alone.num_tokens == [sum(LENGTHS) - len(LENGTHS)] * 3
    assert_equal_runs(judge.run(world, parallel, case=run_packed, **sections, **PACKED), alone)


YARN = {"scaling": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.7, "mscale_all_dim": 1.3}
MODELS = {
    "windows_and_sinks": MODELS_OF_CONTEXT["windows_and_sinks"],
    "dynamic": {"rope": {"scaling": "dynamic", "factor": 4.0, "original_max_position_embeddings": 9}},
    "latent_yarn": MODELS_OF_CONTEXT["latent"] | {"rope": YARN | {"interleaved": True}},
}


@pytest.mark.parametrize("name", MODELS)
def test_a_document_is_seen_and_rotated_as_if_it_were_alone(judge, name):
    """What a window, a sink or a scaled rotation makes of a document depends on its own length and positions."""
    sections: dict[str, Mapping[str, Any]] = {"model": MODELS[name], "train": {"num_steps": 3}}
    alone = judge.run(1, {}, case=run_alone, **sections)
    assert_equal_runs(judge.run(*LAYOUTS["cp2"], case=run_packed, **sections, **PACKED), alone)
