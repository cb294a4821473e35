"""Losses of offline preferences as pure functions of what answers are worth to a policy: one value a pair, or a sample.

A log-probability is that of a whole answer, summed over its tokens, in nats; a log-ratio is the policy's less the
reference's. `chosen` and `rejected` are fp32 `[num_pairs]`, with the policy's gradient; callers weigh and sum.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu


def dpo(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Return -(1 - e) log s(beta d) - e log s(-beta d) with d the difference of log-ratios and s the sigmoid.

    DPO (arXiv:2305.18290, eq. 7); with e above 0, the share of pairs whose labels are taken to be the wrong way round,
    cDPO (Mitchell 2023, "A note on DPO with noisy preferences & relationship to IPO").
    """
    margin = beta * (chosen - rejected)
    return -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)


def rdpo(
    chosen: Tensor, rejected: Tensor, chosen_tokens: Tensor, rejected_tokens: Tensor, beta: float, alpha: float
) -> Tensor:
    """Return -log s(beta d + alpha (|y_w| - |y_l|)): a reward for length of `alpha` a token explains its part of d.

    Length-regularised DPO (arXiv:2403.19159): what DPO becomes when a reward less alpha |y| is maximised.
    """
    return -logsigmoid(beta * (chosen - rejected) + alpha * (chosen_tokens - rejected_tokens))


def ipo(chosen: Tensor, rejected: Tensor, chosen_tokens: Tensor, rejected_tokens: Tensor, beta: float) -> Tensor:
    """Return (h - 1 / (2 beta))^2 with h the difference of log-ratios, each by its number of tokens.

    IPO (arXiv:2310.12036, eq. 17), whose tau is beta; the mean over tokens is what its authors confirmed to TRL.
    """
    return (chosen / chosen_tokens - rejected / rejected_tokens - 1 / (2 * beta)).square()


def slic(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Return max(0, 1 - beta d) with d the difference of log-ratios.

    The hinge of SLiC-HF (arXiv:2305.10425, whose margin is 1 / beta) on likelihoods that a reference normalises,
    as in RSO (arXiv:2309.06657).
    """
    return relu(1 - beta * (chosen - rejected))


def apo_zero(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Return 1 - s(beta r_w) + s(beta r_l) of log-ratios r: chosen answers become likelier, rejected ones less.

    For answers that are better than the policy's own. APO-zero (arXiv:2408.06266, eq. 7), 1 added.
    """
    return 1 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected)


def apo_down(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Return s(beta r_w) + 1 - s(beta (r_w - r_l)) of log-ratios r: both become less likely, rejected answers more so.

    For answers that are worse than the policy's own. APO-down (arXiv:2408.06266, eq. 8), 1 added.
    """
    return torch.sigmoid(beta * chosen) + 1 - torch.sigmoid(beta * (chosen - rejected))


def orpo(chosen_mean: Tensor, rejected_mean: Tensor, beta: float) -> Tensor:
    """Return -log p_w - beta log s(log odds_w - log odds_l), odds = p / (1 - p), of mean log-probabilities a token.

    ORPO (arXiv:2403.07691, eq. 6 and 7), whose lambda is beta; without a reference.
    """
    log_odds = chosen_mean - rejected_mean - (_log1mexp(chosen_mean) - _log1mexp(rejected_mean))
    return -chosen_mean - beta * logsigmoid(log_odds)


def simpo(chosen_mean: Tensor, rejected_mean: Tensor, beta: float, gamma: float) -> Tensor:
    """Return -log s(beta (log p_w - log p_l) - gamma) of mean log-probabilities a token.

    SimPO (arXiv:2405.14734); without a reference.
    """
    return -logsigmoid(beta * (chosen_mean - rejected_mean) - gamma)


def kto(
    log_ratios: Tensor,
    is_desirable: Tensor,
    divergence: Tensor,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Tensor:
    """Return w (1 - s(+-beta (r - z))) of single answers `[num_samples]`, + for desirable ones, bool, and - for others.

    z is the divergence of the policy from its reference, a scalar of at least 0 without gradient, and w KTO's lambda of
    the answer's side. KTO (arXiv:2402.01306, eq. 8).
    """
    sign = torch.where(is_desirable, 1.0, -1.0)
    weight = torch.where(is_desirable, desirable_weight, undesirable_weight)
    return weight * (1 - torch.sigmoid(sign * beta * (log_ratios - divergence)))


def _log1mexp(log_p: Tensor) -> Tensor:
    """Return log(1 - exp(x)) of x below 0, exact at both ends; an answer that is certain is taken as nearly so."""
    log_p = log_p.clamp(max=-1e-7)
    return torch.where(log_p > -0.693, torch.log(-torch.expm1(log_p)), torch.log1p(-torch.exp(log_p)))
