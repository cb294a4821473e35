"""Divergences of a student from its teacher as pure functions of log-probabilities, and their mixture with labels.

Classes lie along the last dimension: ids of a vocabulary, or a teacher's likeliest ids and all others as one class.
"""

from __future__ import annotations

import math

import torch

from trainer.losses.cross_entropy import compute_cross_entropy
from trainer.losses.loss import Loss


def diverge(
    teacher_log_probs: torch.Tensor, student_log_probs: torch.Tensor, beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the terms of the generalised Jensen-Shannon divergence `[..., classes]` and what its slopes are made of.

    With p the teacher, q the student and m = beta p + (1 - beta) q it is beta KL(p || m) + (1 - beta) KL(q || m)
    (GKD, arXiv:2306.13649, eq. 1 to 3), and at the ends what TRL takes there, KL(p || q) at 0 and KL(q || p) at 1,
    which are the limits divided by beta and by 1 - beta. The terms add up to the divergence D; with the second result,
    q dD/dq up to a multiple of q, the slope by the student's logit of class j is pull_j - q_j times the sum of pulls.
    Log-probabilities are in nats and finite, also where a probability is 0. Without gradient.
    """
    if beta == 0:
        teacher = teacher_log_probs.exp()
        return teacher * (teacher_log_probs - student_log_probs), -teacher
    student = student_log_probs.exp()
    if beta == 1:
        terms = student * (student_log_probs - teacher_log_probs)
        return terms, terms
    mixture = torch.logaddexp(teacher_log_probs + math.log(beta), student_log_probs + math.log1p(-beta))
    pulls = (1 - beta) * student * (student_log_probs - mixture)
    return beta * teacher_log_probs.exp() * (teacher_log_probs - mixture) + pulls, pulls


def compute_distillation(
    divergence: torch.Tensor,
    cross_entropy: torch.Tensor | None,
    loss_mask: torch.Tensor,
    *,
    temperature: float,
    label_weight: float,
    weights: torch.Tensor | None = None,
) -> Loss:
    """Sum (1 - w) T^2 D + w CE over the tokens where the mask is 1, times `weights`; all `[batch, seq]`, in nats.

    w is `label_weight`, D the divergence of both models' softmax(logits / T), whose gradient shrinks as 1 / T^2 and is
    made up for by it, so that w means the same at every temperature (arXiv:1503.02531, section 2.1). The cross-entropy
    of the labels is at a temperature of 1; None where w is 0.
    """
    losses = (1 - label_weight) * temperature**2 * divergence
    if label_weight:
        assert cross_entropy is not None
        losses = losses + label_weight * cross_entropy
    return compute_cross_entropy(losses, loss_mask, weights)
