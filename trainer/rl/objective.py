"""What a policy is updated by: the surrogate of its method, token by token, weighed as the method weighs answers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from configs.sections.grpo import PolicyMethod
from trainer.data.batch import Batch, with_sample_weights
from trainer.engine.forward import score_language_model
from trainer.losses.cross_entropy import count_tokens
from trainer.losses.loss import Loss, Mean
from trainer.losses.policy import (
    cispo_surrogate,
    clipped_surrogate,
    compute_kl,
    compute_ratio,
    importance_weights,
)
from trainer.model.token_scores import TokenScores

ADVANTAGES, SAMPLED, OLD, REFERENCE = "advantages", "sampled_log_probs", "old_log_probs", "reference_log_probs"
"""Columns of batches, fp32 `[micro_batch, seq]`. Without OLD the policy itself, before the update, is the old one."""
_SHARE, _DOCUMENT = "share", "document"
LOGPROB_DIFFERENCE = "rollout/logprob_difference"
"""How far log-probabilities of generation and of the training forward pass are apart, in nats, mean over tokens."""


class PolicyObjective:
    """One minibatch's policy-gradient loss; `count` is of tokens or of answers, as `normalisation` says."""

    def __init__(
        self, method: PolicyMethod, *, temperature: float, max_new_tokens: int, cp_group: dist.ProcessGroup
    ) -> None:
        self._method, self._temperature, self._cp_group = method, temperature, cp_group
        self._max_new_tokens = max_new_tokens
        names = ["actor/pg_loss", "actor/entropy", "actor/ppo_kl", "actor/clip_frac", LOGPROB_DIFFERENCE]
        if method.kl_coefficient and method.kl_place == "loss":
            names.append("actor/kl")
        if method.importance_cap is not None:
            names.append("rollout/importance_weight")
        self.mean_names: tuple[str, ...] = tuple(names)

    def finish(self, batch: Batch) -> Batch:
        """Return a microbatch with the columns that weigh its tokens, made before cp ranks share its rows."""
        method = self._method
        if method.normalisation == "token_mean" and method.ratio == "token":
            return batch
        weighed = with_sample_weights(batch)
        share, ends = weighed.columns["weights"], weighed.columns["ends"]
        columns = {**batch.columns, "ends": ends}
        if method.normalisation == "sequence_mean" or method.ratio == "sequence":
            columns[_SHARE] = share
        if method.ratio == "sequence":
            assert batch.documents is not None
            lengths = torch.tensor(batch.documents.bounds).diff()
            numbers = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
            columns[_DOCUMENT] = numbers.view(batch.tokens.shape)
        return replace(batch, columns=columns)

    def forward(self, model: Any, batch: Batch) -> torch.Tensor:
        """Return `[2, batch, seq]`: log-probabilities of the labels, and entropies; hidden states but from the last."""
        scores = score_language_model(model, batch, temperature=self._temperature, entropy=True)
        if not isinstance(scores, TokenScores):
            return scores
        assert scores.entropy is not None
        return torch.stack([scores.log_probs, scores.entropy])

    def loss(self, output: torch.Tensor, batch: Batch) -> Loss:
        """Return the summed loss of one microbatch. With ratios of answers, collective: all cp ranks must call this."""
        method, columns = self._method, batch.columns
        is_trained = batch.loss_mask > 0
        log_probs, entropy = (torch.where(is_trained, one, 0.0) for one in output.unbind())
        old = columns.get(OLD, log_probs.detach())
        ratio = compute_ratio(log_probs, old, self._sequence_log_ratio(log_probs.detach() - old, batch))
        if method.surrogate == "cispo":
            surrogate, is_clipped = cispo_surrogate(
                log_probs, ratio, columns[ADVANTAGES], method.clip_low, method.clip_high
            )
        else:
            surrogate, is_clipped = clipped_surrogate(ratio, columns[ADVANTAGES], method.clip_low, method.clip_high)
        figures = {"actor/clip_frac": is_clipped.float(), "actor/entropy": entropy.detach()}
        figures["actor/ppo_kl"] = old - log_probs.detach()
        figures[LOGPROB_DIFFERENCE] = (old - columns[SAMPLED]).abs()
        if method.importance_cap is not None:
            weights = importance_weights(old, columns[SAMPLED], method.importance_cap)
            surrogate, figures["rollout/importance_weight"] = surrogate * weights, weights
        figures["actor/pg_loss"] = surrogate.detach()
        losses = surrogate
        if method.entropy_bonus:
            losses = losses - method.entropy_bonus * entropy
        if "actor/kl" in self.mean_names:
            divergence = compute_kl(log_probs, columns[REFERENCE], method.kl_estimator)
            losses, figures["actor/kl"] = losses + method.kl_coefficient * divergence, divergence.detach()
        count = count_tokens(batch.loss_mask)
        means = {name: Mean(torch.where(is_trained, figures[name], 0.0).sum(), count) for name in self.mean_names}
        return Loss(torch.where(is_trained, losses * self._weights(batch), 0.0).sum(), means)

    def count(self, batch: Batch) -> torch.Tensor:
        """Return the number of trained tokens, or of answers whose last trained token is here."""
        if self._method.normalisation == "token_mean":
            return count_tokens(batch.loss_mask)
        return batch.columns["ends"].sum(dtype=torch.int32)

    def _weights(self, batch: Batch) -> torch.Tensor | float:
        if self._method.normalisation == "sequence_mean":
            return batch.columns[_SHARE]
        return 1 / self._max_new_tokens if self._method.normalisation == "constant" else 1.0

    def _sequence_log_ratio(self, log_ratio: torch.Tensor, batch: Batch) -> torch.Tensor | None:
        """Return for each token the mean of its answer's log ratios; None where ratios are of tokens."""
        if self._method.ratio == "token":
            return None
        assert batch.documents is not None
        document = batch.columns[_DOCUMENT].flatten()
        means = log_ratio.new_zeros(len(batch.documents.bounds) - 1)
        means.index_add_(0, document, (log_ratio * batch.columns[_SHARE]).flatten())
        dist.all_reduce(means, group=self._cp_group)
        return means[document].view_as(log_ratio)
