"""How far a student is from its teacher from the last hidden states of both, and what a teacher is known by.

As with losses (`trainer.model.output_loss`) the logits of a long row never exist at once, the teacher's neither.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

from trainer.model.divergence import Diverge, TopK, diverge_from_logits, diverge_from_top_k, find_top_k
from trainer.model.output_loss import compute_in_pieces

_NUM_LOGITS = 4
"""Beside a student's logits its teacher's, their terms and their slopes."""
MakeLogits = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Lesson:
    """What a teacher says of a microbatch, and how the student is compared with it."""

    temperature: float
    diverge: tuple[Diverge, ...]
    """Each gives one output."""
    has_labels: bool
    """Whether the cross-entropy of the labels is wanted too."""
    said: tuple[torch.Tensor, ...]
    """The parts of a `TopK`, or the teacher's last hidden states `[batch, seq/cp, hidden]` alone."""
    make_logits: MakeLogits | None = None
    """The teacher's output layer, for hidden states: `[seq, batch, hidden]` -> `[seq, batch, vocab/tp]`."""
    num_ids: int | None = None
    """How many ids the teacher has, where the student has more, which are not compared; None for as many."""

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Lesson:
        """Return the same with what the teacher says changed alike."""
        return replace(self, said=tuple(change(one) for one in self.said))


def compute_divergences(
    *,
    hidden_states: torch.Tensor,
    output_layer: Any,
    output_weight: torch.Tensor | None,
    labels: torch.Tensor,
    compute_language_model_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    context: Lesson,
    **unused: Any,
) -> tuple[torch.Tensor, ...]:
    """Return what the lesson asks for, fp32 `[batch, seq/cp]` each: an output processor of `GPTModel`.

    The divergences in order, then the losses of the labels if asked for; in nats, with gradient. hidden_states
    `[seq/cp, batch, hidden]`, with sp `[seq/(cp*tp), batch, hidden]`.
    """
    group, lesson = output_layer.tp_group, context

    def compare(hidden: torch.Tensor, wanted: torch.Tensor, *said: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits, _ = output_layer(hidden, weight=output_weight)
        shared = logits if lesson.num_ids is None else _keep_ids(logits, lesson.num_ids, group)
        if lesson.make_logits is None:
            top_k = TopK(*said)
            found = [diverge_from_top_k(shared, top_k, lesson.temperature, one, group) for one in lesson.diverge]
        else:
            with torch.no_grad():
                teacher = lesson.make_logits(said[0].transpose(0, 1))
            found = [diverge_from_logits(shared, teacher, lesson.temperature, one, group) for one in lesson.diverge]
        if lesson.has_labels:  # last: the loss may write over the logits
            found.append(compute_language_model_loss(wanted, logits).float())
        return tuple(found)

    weight = output_layer.weight if output_weight is None else output_weight
    targets = (labels, *lesson.said)
    return compute_in_pieces(compare, hidden_states, targets, output_layer, weight, num_logits=_NUM_LOGITS)


def _keep_ids(logits: torch.Tensor, num_ids: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Return logits `[seq, batch, vocab/tp]` that give ids from `num_ids` on no probability."""
    width = logits.shape[-1]
    is_beyond = torch.arange(width, device=logits.device) + group.rank() * width >= num_ids
    return logits.masked_fill(is_beyond, torch.finfo(logits.dtype).min)


def compute_top_k(
    *,
    hidden_states: torch.Tensor,
    output_layer: Any,
    output_weight: torch.Tensor | None,
    labels: torch.Tensor,
    context: tuple[int, float],
    **unused: Any,
) -> TopK:
    """Return the likeliest ids, `context` = (how many, temperature): an output processor. Without gradients."""

    def list_ids(hidden: torch.Tensor, wanted: torch.Tensor) -> TopK:
        logits, _ = output_layer(hidden, weight=output_weight)
        return find_top_k(logits, *context, output_layer.tp_group)

    weight = output_layer.weight if output_weight is None else output_weight
    return TopK(*compute_in_pieces(list_ids, hidden_states, (labels,), output_layer, weight))


def give_hidden(*, hidden_states: torch.Tensor, output_layer: Any, **unused: Any) -> tuple[torch.Tensor]:
    """Return alone the last hidden states `[batch, seq/cp, hidden]`, whole on every tp rank: an output processor."""
    if output_layer.sequence_parallel:
        hidden_states = gather_from_sequence_parallel_region(hidden_states, group=output_layer.tp_group)
    return (hidden_states.transpose(0, 1).contiguous(),)


def output_layer_of(chunk: Any, *, is_copied: bool) -> MakeLogits:
    """Return the output layer of a frozen model's last chunk, which takes hidden states that are whole.

    With `is_copied` it has a weight of its own, as the model's may be elsewhere when it is called.
    """
    layer = chunk.output_layer
    weight = chunk.shared_embedding_or_output_weight() if chunk.share_embeddings_and_output_weights else None
    if is_copied:
        weight = (layer.weight if weight is None else weight).detach().clone()

    def make_logits(hidden: torch.Tensor) -> torch.Tensor:
        is_split, layer.sequence_parallel = layer.sequence_parallel, False
        try:
            return layer(hidden, weight=weight)[0]
        finally:
            layer.sequence_parallel = is_split

    return make_logits
