"""What a teacher says of microbatches: columns for the student's objective, by a frozen model on the same ranks.

Of a whole vocabulary it is the teacher's last hidden states, from which its logits are made a piece at a time beside
the student's; of its likeliest ids these themselves. Only the last pipeline stage has them, also the student's last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from itertools import batched
from typing import Any, Protocol

import torch

from trainer.data.batch import Batch
from trainer.engine.forward import find_likeliest, give_last_hidden
from trainer.engine.sharded_model import ShardedModel
from trainer.model.divergence import Diverge, TopK
from trainer.model.output_divergence import Lesson, MakeLogits, output_layer_of

HIDDEN = "teacher_hidden"
TOP_K = ("teacher_log_probs", "teacher_ids", "teacher_rest")
"""Columns of batches: `[micro_batch, seq, hidden]`, or the parts of a `TopK`."""
AT_ONCE = 8
"""Microbatches whose hidden states are on the device together, times the pipeline's stages."""


class Teacher(Protocol):
    """Who adds columns to batches."""

    temperature: float

    def annotate(self, engine: ShardedModel, batches: Sequence[Batch]) -> list[Batch]:
        """Return a step's microbatches with what the teacher says of them. Collective: all ranks of the world."""
        ...

    def lesson(self, batch: Batch, diverge: tuple[Diverge, ...], *, has_labels: bool) -> Lesson:
        """Return what the student's last chunk is to compare; of no meaning on other pipeline stages."""
        ...


class LiveTeacher:
    """A frozen model that reads what the student reads, before it does; hidden states wait on the host."""

    def __init__(self, model: ShardedModel, temperature: float, top_k: int | None, num_ids: int | None = None) -> None:
        """`num_ids` is how many ids it has, where the student has more."""
        self.temperature, self._num_ids = temperature, num_ids
        self._model, self._top_k = model, top_k
        self._make_logits: MakeLogits | None = None
        self._forward: Any = give_last_hidden
        if top_k is not None:
            self._forward = partial(find_likeliest, k=top_k, temperature=temperature)

    def annotate(self, engine: ShardedModel, batches: Sequence[Batch]) -> list[Batch]:
        """Return the microbatches with the teacher's columns. Collective: all ranks of the world must call this."""
        mesh = self._model.mesh
        multiple = mesh.pp_size if mesh.vpp_size > 1 else 1
        said: list[Batch] = []
        for some in batched(batches, AT_ONCE * mesh.pp_size):
            filled = [*some, *[some[-1]] * (-len(some) % multiple)]
            outputs = self._model.score(filled, self._forward)
            if mesh.is_last_pp_stage:
                said += [with_columns(one, output) for one, output in zip(some, outputs, strict=False)]
        return said if mesh.is_last_pp_stage else list(batches)

    def lesson(self, batch: Batch, diverge: tuple[Diverge, ...], *, has_labels: bool) -> Lesson:
        """Return the comparison with the columns of a batch."""
        names: Sequence[str] = TOP_K
        if self._top_k is None:
            names = (HIDDEN,)
            if self._make_logits is None and self._model.mesh.is_last_pp_stage:
                self._make_logits = self._find_output_layer()
        return make_lesson(
            batch, self.temperature, diverge, names, self._make_logits, self._num_ids, has_labels=has_labels
        )

    def _find_output_layer(self) -> MakeLogits:
        """Return what makes the teacher's logits while the student computes; the teacher may then rest on the host."""
        with self._model.on_device():
            return output_layer_of(self._model.chunks[-1], is_copied=self._model.config.parallel.offload_models)


def with_columns(batch: Batch, said: torch.Tensor | TopK) -> Batch:
    """Return a microbatch with the hidden states or the likeliest ids as columns, on the host."""
    named = dict(zip(TOP_K, said, strict=True)) if isinstance(said, TopK) else {HIDDEN: said}
    return dataclasses.replace(batch, columns={**batch.columns, **{name: one.cpu() for name, one in named.items()}})


def make_lesson(
    batch: Batch,
    temperature: float,
    diverge: tuple[Diverge, ...],
    names: Sequence[str],
    make_logits: MakeLogits | None,
    num_ids: int | None,
    *,
    has_labels: bool,
) -> Lesson:
    """Return the comparison with the columns of these names, as far as this rank has them."""
    said = tuple(batch.columns[name] for name in names if name in batch.columns)
    return Lesson(temperature, diverge, has_labels, said, make_logits, num_ids)
