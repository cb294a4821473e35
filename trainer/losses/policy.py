"""Policy-gradient losses and divergences as pure functions of log-probabilities, token by token: callers weigh and sum.

All tensors are fp32 `[batch, seq]`; log-probabilities are in nats and of the distribution that answers are drawn from.
"""

from __future__ import annotations

from typing import Literal

import torch

_LARGEST_LOG_RATIO = 20.0  # exp of it is 5e8: a ratio beyond tells nothing, and infinity would spoil the whole step


def compute_ratio(
    log_probs: torch.Tensor, old_log_probs: torch.Tensor, sequence_log_ratio: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the importance ratio of each token, pi / pi_old, with gradient.

    `sequence_log_ratio` is the mean over a token's answer of log pi - log pi_old. With it the ratio is the answer's,
    (pi(y) / pi_old(y))^(1 / |y|), with the gradient of GSPO-token (arXiv:2507.18071, eq. 7 and 14), which is GSPO's own
    where the tokens of an answer have one advantage.
    """
    if sequence_log_ratio is None:
        log_ratio = log_probs - old_log_probs
    else:
        log_ratio = sequence_log_ratio.detach() + (log_probs - log_probs.detach())
    return log_ratio.clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO).exp()


def clipped_surrogate(
    ratio: torch.Tensor, advantages: torch.Tensor, clip_low: float, clip_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return -min(r A, clip(r, 1 - low, 1 + high) A) and where the clipped one is the smaller (has no gradient).

    PPO (arXiv:1707.06347, eq. 7), with a bound of its own on each side in DAPO (arXiv:2503.14476, eq. 8).
    """
    free = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return -torch.minimum(free, clipped), clipped < free


def cispo_surrogate(
    log_probs: torch.Tensor, ratio: torch.Tensor, advantages: torch.Tensor, clip_low: float, clip_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return -sg(clip(r, 1 - low, 1 + high)) A log pi, and where the ratio was clipped; every token keeps a gradient.

    CISPO (MiniMax-M1, arXiv:2506.13585, eq. 4 and 5).
    """
    ratio = ratio.detach()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -clipped * advantages * log_probs, clipped != ratio


def compute_kl(
    log_probs: torch.Tensor, reference_log_probs: torch.Tensor, estimator: Literal["k1", "k2", "k3"]
) -> torch.Tensor:
    """Return an estimate of KL(pi || reference) from each token that pi drew (Schulman 2020).

    With d = log pi - log reference: k1 = d, k2 = d^2 / 2, k3 = exp(-d) + d - 1 (GRPO, arXiv:2402.03300, eq. 4).
    """
    distance = log_probs - reference_log_probs
    if estimator == "k1":
        return distance
    if estimator == "k2":
        return distance.square() / 2
    inverse = (-distance).clamp(max=_LARGEST_LOG_RATIO)
    return torch.expm1(inverse) - inverse  # beyond the bound without gradient: that of the rest leads further away


def importance_weights(training_log_probs: torch.Tensor, sampling_log_probs: torch.Tensor, cap: float) -> torch.Tensor:
    """Return min(pi_training / pi_sampling, cap), without gradient: the same weights by two programs.

    Truncated importance sampling (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
    training"); Ionides 2008 for the truncation.
    """
    return (training_log_probs - sampling_log_probs).detach().clamp(max=_LARGEST_LOG_RATIO).exp().clamp(max=cap)
