"""Validation of a reward model: how often it prefers the better answer, and how right it is about how sure it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import batched
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from parallel.collectives import from_last_pp_stage, gather_objects
from trainer.data.batch import Batch
from trainer.data.reader import ValidationReader
from trainer.data.sequences import sum_by_sequence
from trainer.engine.engine import Engine
from trainer.engine.forward import forward_values
from trainer.engine.objective import Objective
from trainer.engine.sharded_model import ShardedModel
from trainer.evaluate.validation import VALIDATION_LOSS, Evaluation, Evaluator, fill_pipeline

NUM_BINS = 10


class RewardEvaluator(Evaluator):
    """Scores every pair of every validation source when asked."""

    def __init__(self, readers: Mapping[str, ValidationReader]) -> None:
        super().__init__(readers, has_perplexity=False)

    def evaluate(self, engine: Engine, objective: Objective) -> Evaluation:
        """Return `validation_<figure>/<source>` of each source; see `judge_rewards`.

        Collective: all ranks of the world must call this.
        """
        values: dict[str, float] = {}
        for name, reader in self._readers.items():
            batches = fill_pipeline(list(reader.batches()), engine.mesh.pp_size if engine.mesh.vpp_size > 1 else 1)
            found = [pair for part in gather_objects(self._score(engine, batches)) for pair in part]
            figures = judge_rewards(np.array(found).reshape(-1, 3))
            values[VALIDATION_LOSS + name] = figures.pop("loss")
            values |= {f"validation_{figure}/{name}": value for figure, value in figures.items()}
        return Evaluation(values)

    def _score(self, engine: Engine, batches: Sequence[Batch]) -> list[list[float]]:
        """Return reward of chosen, of rejected, and margin of each pair of this replica, on one of its ranks."""
        outputs = engine.score(batches, forward_values)
        mesh = engine.mesh
        if not (mesh.is_last_pp_stage and mesh.tp_rank == 0 and mesh.cp_rank == 0):
            return []
        pairs = []
        for batch, output in zip(batches, outputs, strict=True):
            counted = torch.where(batch.loss_mask > 0, output.cpu().double(), 0.0)
            num_sequences, sequence = len(batch.sequences["side"]), batch.columns["sequence"]
            rewards = sum_by_sequence(counted, sequence, num_sequences).view(-1, 2)
            is_counted = sum_by_sequence(batch.columns["ends"].double(), sequence, num_sequences)[::2] > 0
            rows = torch.cat([rewards, batch.sequences["margin"].double().unsqueeze(-1)], dim=1)
            pairs += rows[is_counted].tolist()
        return pairs


def score_rows(model: ShardedModel, rows: Sequence[Sequence[int]], rows_at_once: int = 8) -> list[float]:
    """Return the reward of each row of token ids: the value at its last token. Collective: all ranks of the world."""
    mesh = model.mesh
    multiple = mesh.tp_size * (2 * mesh.cp_size if mesh.cp_size > 1 else 1)
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    rewards = torch.zeros(len(rows))
    for some in batched(order, rows_at_once):
        longest = math.ceil(max(len(rows[number]) for number in some) / multiple) * multiple
        tokens = torch.zeros(len(some), longest, dtype=torch.int64)
        for place, number in enumerate(some):
            tokens[place, : len(rows[number])] = torch.tensor(rows[number])
        positions = torch.arange(longest).expand(len(some), -1).contiguous()
        batch = Batch(tokens, tokens, positions, torch.ones(tokens.shape))
        found = model.score([batch] * (mesh.pp_size if mesh.vpp_size > 1 else 1), forward_values)
        values = found[0] if found else torch.empty(tokens.shape, device=mesh.device)
        values = from_last_pp_stage(values, mesh).cpu()
        for place, number in enumerate(some):
            rewards[number] = values[place, len(rows[number]) - 1]
    return rewards.tolist()


def judge_rewards(pairs: NDArray[np.float64]) -> dict[str, float]:
    """Return the figures of pairs `[num_pairs, 3]`: reward of chosen and of rejected, and margin.

    Those of TRL's names, the mean Bradley-Terry `loss`, and `calibration_error` (`calibration_error`).
    """
    chosen, rejected, margin = pairs.T
    differences = chosen - rejected
    rewards = np.concatenate([chosen, rejected])
    return {
        "loss": _mean(np.logaddexp(0.0, margin - differences)),
        "accuracy": _mean(differences > 0),
        "margin": _mean(differences),
        "calibration_error": calibration_error(differences),
        "min_reward": float(rewards.min()),
        "mean_reward": _mean(rewards),
        "max_reward": float(rewards.max()),
    }


def calibration_error(differences: NDArray[np.float64]) -> float:
    """Return the expected calibration error of preferring by sigmoid(difference) (arXiv:1706.04599, eq. 3).

    The model prefers the answer of more reward with a confidence of sigmoid(|difference|), from 0.5 to 1, and is right
    where that is the chosen one. In ten bins of confidence of one width: how far its mean is from the share that is
    right, weighed by the pairs in each.
    """
    confidence = 1 / (1 + np.exp(-np.abs(differences)))
    is_right = differences > 0
    bins = np.minimum(((confidence - 0.5) * 2 * NUM_BINS).astype(int), NUM_BINS - 1)
    gaps = [abs(math.fsum(confidence[bins == number] - is_right[bins == number])) for number in range(NUM_BINS)]
    return math.fsum(gaps) / len(differences)


def _mean(values: NDArray[Any]) -> float:
    return math.fsum(values) / len(values)
