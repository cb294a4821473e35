"""Updates by preferences on packed pairs are, on every layout, those of the written-out losses, pair by pair."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from configs.sections.preference import PreferenceMethod, PreferenceSection
from configs.stages import Config
from tests.parity.conftest import TOLERANCE, assert_equal_runs
from tests.parity.test_parity_packing import RandomDocuments
from tests.parity.test_parity_sft import LAYOUTS as LAYOUTS_OF_SFT
from tests.pool import Place
from tests.small_runs import SEQ_LEN, VOCAB_SIZE, RunRecord, open_engine, record_run

# Tokens of chosen and rejected; the first pair fills a row, and the others lie two in a row or alone.
PAIRS = [(21, 13), (17, 16), (14, 12), (9, 22), (12, 4), (4, 7), (15, 10), (3, 6), (20, 3), (5, 8), (18, 9), (2, 3)]
# One update each, one after the other on the same weights.
METHODS: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 0.5, "sft_weight": 0.2},
    "ipo": {"beta": 0.4},
    "orpo": {"beta": 0.7},
    "kto": {"beta": 0.6, "undesirable_weight": 1.4},
    "simpo": {},
    "rdpo": {"beta": 0.3},
    "apo_down": {"beta": 0.5},
}
RATE = 1e-3
PACKED = {"packing": "best_fit", "document_mask": True}
LAYOUTS = LAYOUTS_OF_SFT | {"tp2": (2, {"tp": 2}, {}), "pp2": (2, {"pp": 2}, {}), "cp2_dp2": (4, {"cp": 2}, {})}


@dataclass(frozen=True)
class PreferenceRecord(RunRecord):
    """What the updates did, and what they reported."""

    metrics: list[dict[str, float]]


class RandomPairs(RandomDocuments):
    """Answers of random tokens side by side, the ends of which are trained."""

    def __init__(self, *, is_single: bool = False) -> None:
        super().__init__([length for pair in PAIRS for length in pair])
        self.sides = [1, 2] * len(PAIRS)
        if is_single:
            self.sides = [side for number in range(len(PAIRS)) for side in (1 + number % 3 // 2, 3)]
        self.masks = [np.full(length, side, np.uint8) for length, side in zip(self.lengths, self.sides, strict=True)]
        for mask in self.masks:
            mask[: int(self.random.integers(1, len(mask)))] = 0

    def read_mask(self, document: int, start: int, length: int) -> np.ndarray:
        """Return the side of each token that is trained."""
        return self.masks[document][start : start + length]


class WrittenOut:
    """The loss of one pair in a batch of two padded rows, as the papers have it."""

    mean_names = ("rewards/margins", "logps/chosen")

    def __init__(self, method: PreferenceMethod) -> None:
        self._method = method

    def forward(self, model: Any, batch: Any) -> Any:
        """Return the log-probabilities of both."""
        from trainer.rl.reference_scores import forward_log_probs

        return forward_log_probs(model, batch)

    def count(self, batch: Any) -> Any:
        """Return the one pair."""
        import torch

        return torch.tensor(1, dtype=torch.int32)

    def loss(self, output: Any, batch: Any) -> Any:
        """Return its loss."""
        import torch

        from trainer.losses.loss import Loss, Mean

        method = self._method
        chosen, rejected = (row[mask > 0].sum() for row, mask in zip(output, batch.loss_mask, strict=True))
        chosen_tokens, rejected_tokens = batch.loss_mask.sum(1)
        frozen_chosen, frozen_rejected, divergence = batch.sequences["given"]
        a, b = chosen - frozen_chosen, rejected - frozen_rejected
        p, q = torch.exp(chosen / chosen_tokens), torch.exp(rejected / rejected_tokens)
        beta, margin = method.beta, method.beta * (a - b)
        if method.loss == "dpo":
            value = torch.log(1 + torch.exp(-margin)) - method.sft_weight * torch.log(p)
        elif method.loss == "ipo":
            value = (a / chosen_tokens - b / rejected_tokens - 0.5 / beta) ** 2
        elif method.loss == "orpo":
            odds = (p / (1 - p)) / (q / (1 - q))
            value, margin = -torch.log(p) - beta * torch.log(torch.sigmoid(torch.log(odds))), beta * torch.log(p / q)
        elif method.loss == "simpo":
            margin = beta * torch.log(p / q)
            value = -torch.log(torch.sigmoid(margin - method.target_margin))
        elif method.loss == "rdpo":
            value = torch.log(1 + torch.exp(-margin - 0.05 * (chosen_tokens - rejected_tokens)))
        elif method.loss == "apo_down":
            value = torch.sigmoid(beta * a) + 1 - torch.sigmoid(margin)
        elif int(batch.sequences["side"]) == 1:
            value = 1 - torch.sigmoid(beta * (a - divergence))
        else:
            value = method.undesirable_weight * (1 - torch.sigmoid(beta * (divergence - a)))
        count, is_pair = torch.tensor(1), method.loss != "kto"
        figures = margin if is_pair else torch.zeros(()), chosen
        return Loss(value, {n: Mean(one.detach(), count) for n, one in zip(self.mean_names, figures, strict=True)})


def read_alone(data: RandomPairs) -> Iterator[Any]:
    """Yield every pair as two rows as long as the longer, plain causal attention over each."""
    import torch

    from trainer.data.batch import Batch

    for first in range(0, data.num_documents, 2):
        longest = int(data.lengths[first : first + 2].max()) - 1
        planes = np.zeros((3, 2, longest), dtype=np.int64)
        for row in (0, 1):
            ids, mask = data.documents[first + row], data.masks[first + row]
            for plane, part in zip(planes, (ids[:-1], ids[1:], mask[1:] > 0), strict=True):
                plane[row, : len(ids) - 1] = part
        tokens, labels, trained = map(torch.from_numpy, planes)
        positions = torch.arange(longest).expand(2, -1).contiguous()
        side = torch.tensor(data.sides[first])
        yield Batch(tokens, labels, positions, trained.float(), sequences={"side": side}, sample_ids=(0, 1))


def score_alone(engine: Any, batches: Sequence[Any]) -> np.ndarray:
    """Return the log-probabilities `[num_pairs, 2]` of whole answers."""
    from trainer.rl.reference_scores import forward_log_probs

    outputs = engine.score(batches, forward_log_probs)
    return np.array([(one * batch.loss_mask).sum(1).numpy() for one, batch in zip(outputs, batches, strict=True)])


def method_of(name: str) -> PreferenceMethod:
    """Return a loss in full."""
    return PreferenceSection.model_validate({"loss": name, **METHODS[name]}).method


def update_alone(place: Place, config: Config, run_dir: str, masks: str) -> PreferenceRecord:
    """Update by the written-out losses on pairs one by one."""
    from dataclasses import replace

    import torch

    with open_warm(place, config, run_dir) as engine:
        results, frozen = [], {}
        for is_single in (False, True):
            frozen[is_single] = score_alone(engine, list(read_alone(RandomPairs(is_single=is_single))))
        for name in METHODS:
            held, batches = frozen[name == "kto"], list(read_alone(RandomPairs(is_single=name == "kto")))
            divergence = max(0.0, float((score_alone(engine, batches) - held)[:, 1].mean()))
            given = [torch.tensor([*pair, divergence]) for pair in held.tolist()]
            batches = [
                replace(batch, sequences={**batch.sequences, "given": own})
                for batch, own in zip(batches, given, strict=True)
            ]
            results.append(engine.train_step(batches, WrittenOut(method_of(name)), RATE))
        return make_record(engine, results)


def update_in_rows(place: Place, config: Config, run_dir: str, masks: str) -> PreferenceRecord:
    """Update as the stage does, the reference being the weights of the beginning."""
    from trainer.data.sequences import with_sequences
    from trainer.rl.reference_scores import ReferenceScores
    from trainer.stages.preference import PreferenceObjective

    with open_warm(place, config, run_dir) as engine:
        results, reference = [], ReferenceScores(engine.mesh)
        for is_single in (False, True):
            reference.remember(engine, [RowsOfPairs(engine, with_sequences, is_single)])
        for name in METHODS:
            objective = PreferenceObjective(method_of(name), reference, engine.mesh.cp_group)
            batches = list(RowsOfPairs(engine, objective.finish, name == "kto").batches())
            results.append(engine.train_step(objective.prepare(engine, batches), objective, RATE))
        return make_record(engine, results)


class RowsOfPairs:
    """A rank's microbatches of all pairs."""

    def __init__(self, engine: Any, finish: Any, is_single: bool) -> None:
        self._engine, self._finish, self._is_single = engine, finish, is_single

    def batches(self) -> Iterator[Any]:
        """Yield them."""
        from trainer.data.packed_source import PairedSource

        source = PairedSource(RandomPairs(is_single=self._is_single), SEQ_LEN, seed=1)  # type: ignore[arg-type]
        reader = read_pairs(self._engine, source, self._finish)
        yield from reader.read_step()
        reader.close()


def read_pairs(engine: Any, source: Any, finish: Any) -> Any:
    """Return a reader of packed pairs, all of which are one global batch."""
    from trainer.data.blend import Blend
    from trainer.data.reader import BatchReader

    train, mesh = engine.config.train, engine.mesh
    assert source.num_samples == train.global_batch_size and source.padding_share > 0.01
    return BatchReader(
        Blend([source], [1.0]),
        micro_batch_size=train.micro_batch_size,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp_size,
        global_batch_size_at=lambda consumed: train.global_batch_size,
        vocab_size=VOCAB_SIZE,
        finish=finish,
    )


@contextlib.contextmanager
def open_warm(place: Place, config: Config, run_dir: str) -> Iterator[Any]:
    """Yield the engine with the seed's weights."""
    from trainer.checkpoint.layout import resolve_checkpoint
    from trainer.checkpoint.load import warm_start

    with open_engine(place, config) as engine:
        warm_start(engine, resolve_checkpoint(run_dir))
        yield engine


def make_record(engine: Any, results: Sequence[Any]) -> PreferenceRecord:
    """Return the record of updates done. Collective: all ranks of the world must call this."""
    record = record_run(engine, list(results))
    return PreferenceRecord(**vars(record), metrics=[result.metrics for result in results])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_updates_in_packed_rows_equal_pairs_alone(judge, layout):
    world, parallel, model = LAYOUTS[layout]
    sections: dict[str, Mapping[str, Any]] = {"model": model, "train": {"micro_batch_size": 2}}
    alone = judge.run(1, {}, case=update_alone, **sections)
    rows = judge.run(world, parallel, case=update_in_rows, **sections, data=PACKED)
    assert_equal_runs(rows, alone)
    assert len({round(loss, 4) for loss in rows.losses}) == len(METHODS)
    for name, found, expected in zip(METHODS, rows.metrics, alone.metrics, strict=True):
        if name != "kto":
            for figure, value in expected.items():
                assert found[figure] == pytest.approx(value, rel=10 * TOLERANCE, abs=10 * TOLERANCE), (name, figure)
