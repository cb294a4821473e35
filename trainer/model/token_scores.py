"""What the model says of each label beside its loss: log-probability, entropy, whether it is the first choice.

From logits whose vocabulary tp ranks share, in one pass; Megatron-Core's cross-entropy has neither a temperature nor
an entropy. Losses alone go through that one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist


class TokenScores(NamedTuple):
    """Of the distribution softmax(logits / temperature) over the real ids, `[batch, seq]` each."""

    log_probs: torch.Tensor
    """Of the labels, in nats, fp32, with gradient: minus the loss at a temperature of 1."""
    entropy: torch.Tensor | None = None
    """- sum p log p over the vocabulary in nats, fp32, with gradient; None unless asked for."""
    is_greedy: torch.Tensor | None = None
    """Whether the label has the largest logit, of equal ones the lowest id; bool, None unless asked for."""

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> TokenScores:
        """Return the scores that there are, changed alike."""
        entropy, is_greedy = (None if one is None else change(one) for one in (self.entropy, self.is_greedy))
        return TokenScores(change(self.log_probs), entropy, is_greedy)


@dataclass(frozen=True)
class Scoring:
    """What is asked of the logits beside the log-probabilities."""

    temperature: float = 1.0
    """What the logits are divided by, as when sampling; above 0."""
    entropy: bool = False
    is_greedy: bool = False


def score_logits(
    logits: torch.Tensor, labels: torch.Tensor, scoring: Scoring, group: dist.ProcessGroup, *, is_compiled: bool
) -> TokenScores:
    """Return the scores of `labels [batch, seq]` by `logits [seq, batch, vocab/tp]`, in fp32 whatever the logits are.

    `group` are the ranks that share the vocabulary; all of them get the same scores. Logits of ids that are none are
    the format's smallest number. Collective: all ranks of the group must call this.
    """
    scores = _VocabularyScores.apply(logits, labels.t().contiguous(), scoring, group, is_compiled)
    return TokenScores(*scores).map(lambda one: one.t().contiguous())


class _VocabularyScores(torch.autograd.Function):
    """Scores `[seq, batch]`, and the gradient of those that have one.

    With p = softmax(z), z = logits / T, y the label and H the entropy: d log p_y / dz_j = [j = y] - p_j and
    dH / dz_j = -p_j (log p_j + H).
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        labels: torch.Tensor,
        scoring: Scoring,
        group: dist.ProcessGroup,
        is_compiled: bool,
    ) -> tuple[torch.Tensor | None, ...]:
        """Exponentiate once, sum over the ranks once."""
        ctx.dtype, ctx.scoring, ctx.is_compiled = logits.dtype, scoring, is_compiled
        first_id = group.rank() * logits.shape[-1]
        largest, is_greedy = _find_largest(logits, labels, first_id, scoring, group)
        place = labels - first_id
        is_here = (place >= 0) & (place < logits.shape[-1])
        place = torch.where(is_here, place, 0).unsqueeze(-1)
        exponentiate, normalise, _ = _kernels(is_compiled)
        exps, sums = exponentiate(logits, largest, place, is_here, scoring.temperature, scoring.entropy)
        dist.all_reduce(sums, group=group)
        probabilities, log_probs, entropy = normalise(exps, sums)
        ctx.save_for_backward(probabilities, place, is_here, entropy)
        if is_greedy is not None:
            ctx.mark_non_differentiable(is_greedy)
        ctx.set_materialize_grads(False)
        return log_probs, entropy, is_greedy

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Return the gradient of this rank's part of the logits, in their format."""
        of_log_probs, of_entropy, _ = gradients
        probabilities, place, is_here, entropy = ctx.saved_tensors
        *_, differentiate = _kernels(ctx.is_compiled)
        if of_log_probs is None:
            of_log_probs = torch.zeros(is_here.shape, device=is_here.device)
        by_temperature = [
            part if part is None else part / ctx.scoring.temperature for part in (of_log_probs, of_entropy)
        ]
        gradient = differentiate(probabilities, place, is_here, entropy, *by_temperature)
        return gradient.to(ctx.dtype), None, None, None, None


def _find_largest(
    logits: torch.Tensor, labels: torch.Tensor, first_id: int, scoring: Scoring, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the largest logit of each token and, if asked for, whether the label is the lowest id that has it."""
    if not scoring.is_greedy:
        largest = logits.amax(dim=-1).float()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        return largest, None
    mine, place = logits.max(dim=-1)  # of equal ones the first
    largest = mine.float().clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    chosen = torch.where(mine == largest, place + first_id, torch.iinfo(place.dtype).max)
    dist.all_reduce(chosen, op=dist.ReduceOp.MIN, group=group)
    return largest, chosen == labels


@functools.cache
def _kernels(is_compiled: bool) -> tuple[Callable[..., Any], ...]:
    """Return the passes over the logits, on devices that gain from it as one kernel each."""
    passes = (_exponentiate, _normalise, _differentiate)
    return tuple(torch.compile(one) for one in passes) if is_compiled else passes


def _exponentiate(
    logits: torch.Tensor, largest: torch.Tensor, place: torch.Tensor, is_here: torch.Tensor, temperature: float,
    has_entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return exp(z), z the distance to the largest logit over the temperature, and sums `[2 or 3, seq, batch]`.

    They are the label's z where it is among these ids, sum exp(z), and sum z exp(z).
    """
    # Not in the place of the logits: torch 2.11's compiler would gather the label's from what is written over them.
    distances = logits - largest.unsqueeze(-1)
    if temperature != 1.0:
        distances.div_(temperature)
    of_label = torch.where(is_here, distances.gather(-1, place).squeeze(-1), 0.0)
    exps = distances.exp_()
    sums = [of_label, exps.sum(dim=-1)]
    if has_entropy:
        sums.append(_times_log(exps).sum(dim=-1))
    return exps, torch.stack(sums)


def _normalise(exps: torch.Tensor, sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return the probabilities, those of the labels as logarithms, and the entropy where its sum is there."""
    of_label, total, *weighted = sums.unbind()
    log_total = total.log()
    entropy = log_total - weighted[0] / total if weighted else None
    return exps.div_(total.unsqueeze(-1)), of_label - log_total, entropy


def _differentiate(
    probabilities: torch.Tensor, place: torch.Tensor, is_here: torch.Tensor, entropy: torch.Tensor | None,
    of_log_probs: torch.Tensor, of_entropy: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """Return the gradient of z."""
    gradient = probabilities * -of_log_probs.unsqueeze(-1)
    if entropy is not None and of_entropy is not None:
        surprise = _times_log(probabilities).addcmul_(probabilities, entropy.unsqueeze(-1))
        gradient.addcmul_(surprise, -of_entropy.unsqueeze(-1))
    return gradient.scatter_add_(-1, place, torch.where(is_here, of_log_probs, 0.0).unsqueeze(-1))


def _times_log(values: torch.Tensor) -> torch.Tensor:
    """Return x log x, 0 where x is 0."""
    return values.clamp_min(torch.finfo(values.dtype).tiny).log_().mul_(values)
