"""How far a student's logits are from a teacher's, token by token, over a vocabulary that tp ranks share.

The teacher is known by all of its logits or by its likeliest ids. Which divergence it is, the caller says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

Diverge = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Log-probabilities of classes `[..., classes]` by the teacher and by the student -> the terms of the divergence, and
pulls: the slope by the student's logit of class j is pull_j - q_j sum(pulls) (`trainer.losses.distillation`)."""
_LOWEST = -1e30  # of a log-probability: times the probability of 0 that it stands for it is 0


class TopK(NamedTuple):
    """A teacher's likeliest ids of each token under softmax(logits / temperature)."""

    log_probs: torch.Tensor
    """In nats, fp32 `[batch, seq, k]`, falling."""
    ids: torch.Tensor
    """int32 `[batch, seq, k]`."""
    rest: torch.Tensor
    """Log of the probability of all other ids together, fp32 `[batch, seq]`."""

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> TopK:
        """Return all three, changed alike."""
        return TopK(*(change(one) for one in self))


def find_top_k(logits: torch.Tensor, k: int, temperature: float, group: dist.ProcessGroup) -> TopK:
    """Return the `k` likeliest ids by `logits [seq, batch, vocab/tp]` on all ranks of `group`; without gradient.

    Of ids with equal logits at the end of the list it is open which are in. Collective: all ranks of the group.
    """
    scaled, log_total = _normalise(logits, temperature, group)
    width, first_id = logits.shape[-1], group.rank() * logits.shape[-1]
    values, places = scaled.topk(min(k, width), dim=-1)
    candidates = _gather(torch.stack([values, (places + first_id).to(values.dtype)]), group)  # ids up to 2^24 are exact
    values, order = candidates[0].topk(k, dim=-1)
    ids = candidates[1].gather(-1, order).long()
    is_listed = torch.zeros_like(scaled).scatter_add_(-1, *_place(ids, first_id, width))
    others = torch.where(is_listed > 0, 0.0, scaled.exp()).sum(-1)
    dist.all_reduce(others, group=group)
    return TopK(values - log_total.unsqueeze(-1), ids.int(), _log(others) - log_total).map(
        lambda one: one.transpose(0, 1).contiguous()
    )


def diverge_from_logits(
    logits: torch.Tensor, teacher: torch.Tensor, temperature: float, diverge: Diverge, group: dist.ProcessGroup
) -> torch.Tensor:
    """Return the divergence of softmax(logits / temperature) from the teacher's, fp32 `[batch, seq]`, with gradient.

    Logits of both are `[seq, batch, vocab/tp]`; of ids that are none they are the format's smallest number. Collective:
    all ranks of the group must call this.
    """
    return _FromLogits.apply(logits, teacher, temperature, diverge, group).t().contiguous()


def diverge_from_top_k(
    logits: torch.Tensor, teacher: TopK, temperature: float, diverge: Diverge, group: dist.ProcessGroup
) -> torch.Tensor:
    """Return the divergence over k + 1 classes, the ids of `teacher` and all others as one: fp32 `[batch, seq]`.

    With all ids listed it is that over the vocabulary, else never more: what lies within the others is not judged, and
    how likely they are together is, which renormalised lists would leave out. Collective: all ranks of the group.
    """
    log_probs, ids, rest = teacher.map(lambda one: one.transpose(0, 1))
    classes = torch.cat([log_probs, rest.unsqueeze(-1)], dim=-1)
    return _FromTopK.apply(logits, classes, ids.long(), temperature, diverge, group).t().contiguous()


class _FromLogits(torch.autograd.Function):
    """Keeps the gradient of each token's divergence, in fp32, and nothing else."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, teacher: torch.Tensor, temperature: float, diverge: Diverge,
        group: dist.ProcessGroup,
    ) -> torch.Tensor:  # fmt: skip
        """Return the sums over the classes of all ranks."""
        of_teacher, of_student = (_log_softmax(one, temperature, group) for one in (teacher, logits))
        terms, pulls = diverge(of_teacher, of_student)
        sums = torch.stack([terms.sum(-1), pulls.sum(-1)])
        dist.all_reduce(sums, group=group)
        ctx.dtype = logits.dtype
        if ctx.needs_input_grad[0]:
            slopes = torch.addcmul(pulls, of_student.exp_(), sums[1].unsqueeze(-1), value=-1)
            ctx.save_for_backward(slopes.div_(temperature))
        return sums[0]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradient of this rank's part of the logits, in their format."""
        return (ctx.saved_tensors[0] * gradients[0].unsqueeze(-1)).to(ctx.dtype), None, None, None, None


class _FromTopK(torch.autograd.Function):
    """The same over listed ids, which every rank knows all of, and the class of the others."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, teacher: torch.Tensor, ids: torch.Tensor, temperature: float,
        diverge: Diverge, group: dist.ProcessGroup,
    ) -> torch.Tensor:  # fmt: skip
        """Return the divergence, the same on all ranks."""
        log_probs = _log_softmax(logits, temperature, group)
        width = logits.shape[-1]
        places, is_here = _place(ids, group.rank() * width, width)
        is_listed = torch.zeros_like(log_probs).scatter_add_(-1, places, is_here) > 0
        listed = torch.where(is_here > 0, log_probs.gather(-1, places), 0.0)
        probabilities = log_probs.exp_()
        others = torch.where(is_listed, 0.0, probabilities).sum(-1, keepdim=True)
        found = torch.cat([listed, others], dim=-1)
        dist.all_reduce(found, group=group)
        student = torch.cat([found[..., :-1], _log(found[..., -1:])], dim=-1)
        terms, pulls = diverge(teacher, student)
        ctx.dtype = logits.dtype
        if ctx.needs_input_grad[0]:
            slopes = pulls - student.exp() * pulls.sum(-1, keepdim=True)  # of classes
            of_others = probabilities * (slopes[..., -1:] / student[..., -1:].exp())
            of_listed = torch.zeros_like(of_others).scatter_add_(-1, places, slopes[..., :-1] * is_here)
            ctx.save_for_backward(torch.where(is_listed, of_listed, of_others).div_(temperature))
        return terms.sum(-1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradient of this rank's part of the logits, in their format."""
        return (ctx.saved_tensors[0] * gradients[0].unsqueeze(-1)).to(ctx.dtype), None, None, None, None, None


def _normalise(logits: torch.Tensor, temperature: float, group: dist.ProcessGroup) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits over the temperature less the largest of all ranks, fp32, and the log of their sum of powers."""
    largest = logits.amax(dim=-1, keepdim=True).float()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    scaled = (logits - largest).div_(temperature).clamp_(min=_LOWEST)
    total = scaled.exp().sum(-1)
    dist.all_reduce(total, group=group)
    return scaled, total.log()


def _log_softmax(logits: torch.Tensor, temperature: float, group: dist.ProcessGroup) -> torch.Tensor:
    scaled, log_total = _normalise(logits, temperature, group)
    return scaled.sub_(log_total.unsqueeze(-1))


def _place(ids: torch.Tensor, first_id: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where ids lie among this rank's, 0 for those of others, and 1.0 for its own."""
    places = ids - first_id
    is_here = (places >= 0) & (places < width)
    return torch.where(is_here, places, 0), is_here.float()


def _gather(values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return the values of all ranks side by side in the last dimension."""
    parts = [torch.empty_like(values) for _ in range(group.size())]
    dist.all_gather(parts, values.contiguous(), group=group)
    return torch.cat(parts, dim=-1)


def _log(probabilities: torch.Tensor) -> torch.Tensor:
    """Return logarithms, finite where a probability is 0."""
    return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
