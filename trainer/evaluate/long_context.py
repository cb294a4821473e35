"""What a model makes of long texts: perplexity by position, and passkeys by length and depth, on any layout.

Knows nothing of files or figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parallel.collectives import gather_objects
from trainer.data.batch import build_batch
from trainer.engine.forward import score_language_model
from trainer.engine.sharded_model import ShardedModel
from trainer.evaluate.passkey import PasskeyMaker


@dataclass(frozen=True)
class Bucket:
    """Predictions at the positions `first` to `end` - 1 of long documents."""

    first: int
    end: int
    loss: float
    """Mean cross-entropy in nats."""
    num_tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))


@dataclass(frozen=True)
class Cell:
    """Pass keys of one length and depth."""

    length: int
    depth: float
    accuracy: float
    """Share of texts of which greedy decoding gives every token of the answer."""
    loss: float
    """Mean cross-entropy in nats of the answers' tokens."""
    num_texts: int


def measure_perplexity(model: ShardedModel, rows: NDArray[np.int64], edges: Sequence[int]) -> list[Bucket]:
    """Return the loss of the positions between successive `edges` over all `rows` `[n, length + 1]`.

    Position p predicts token p + 1 of its document. Collective: all ranks of the world must call this.
    """

    def add_up(row: int, losses: NDArray[np.float32], hits: NDArray[np.bool_]) -> list[float]:
        return [float(losses[first:end].sum(dtype=np.float64)) for first, end in zip(edges, edges[1:], strict=False)]

    sums = np.sum(score_rows(model, rows, add_up), axis=0)
    counts = [len(rows) * (end - first) for first, end in zip(edges, edges[1:], strict=False)]
    return [
        Bucket(first, end, total / count, count)
        for first, end, total, count in zip(edges, edges[1:], sums.tolist(), counts, strict=False)
    ]


def measure_passkeys(
    model: ShardedModel, maker: PasskeyMaker, length: int, depth: float, num_texts: int, seed: int
) -> Cell:
    """Return how often the key is found. Texts depend on (seed, length, depth) alone.

    Collective: all ranks of the world must call this.
    """
    random = np.random.default_rng([seed, length, round(depth * 1e6)])
    texts = [maker.make(length, depth, random) for _ in range(num_texts)]

    def judge(row: int, losses: NDArray[np.float32], hits: NDArray[np.bool_]) -> tuple[bool, float, int]:
        count = texts[row].num_answer_tokens
        return bool(hits[-count:].all()), float(losses[-count:].sum()), count

    judged = score_rows(model, np.stack([text.tokens for text in texts]), judge)
    found, losses, counts = (np.array(column, dtype=np.float64) for column in zip(*judged, strict=True))
    return Cell(length, depth, float(found.mean()), float(losses.sum() / counts.sum()), num_texts)


def score_rows(
    model: ShardedModel, rows: NDArray[np.int64], reduce: Callable[[int, NDArray[Any], NDArray[Any]], Any]
) -> list[Any]:
    """Return `reduce(row, losses, hits)` of every row `[length + 1]`, in order, on every rank.

    losses `[length]` in nats and hits `[length]`, whether the next token is the likeliest, are of one row each; one row
    is a microbatch, and data-parallel ranks share them. Collective: all ranks of the world must call this.
    """
    mesh = model.mesh
    mine = list(range(mesh.dp_rank, len(rows), mesh.dp_size))
    # Every rank takes part in as many forward passes; the interleaved schedule wants a multiple of pp of them.
    multiple = mesh.pp_size if mesh.vpp_size > 1 else 1
    num_batches = math.ceil(math.ceil(len(rows) / mesh.dp_size) / multiple) * multiple
    padded = mine + [0] * (num_batches - len(mine))
    batches = [build_batch(rows[row : row + 1], (row,)) for row in padded]
    outputs = model.score(batches, partial(score_language_model, is_greedy=True))
    results = {}
    if outputs and mesh.tp_rank == 0 and mesh.cp_rank == 0:
        for row, output in zip(mine, outputs, strict=False):
            results[row] = reduce(row, -output.log_probs[0].cpu().numpy(), output.is_greedy[0].cpu().numpy())
    merged = {row: result for part in gather_objects(results) for row, result in part.items()}
    return [merged[row] for row in range(len(rows))]
