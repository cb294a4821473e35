"""Fine-tuning on packed conversations: loss and accuracy by token and by sample against float64, and it learns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tools.device_checks.engine import build_config
from tools.device_checks.outcome import Outcome, judge
from tools.one_rank import open_engine

if TYPE_CHECKING:
    from parallel.mesh import Mesh

TOLERANCE = 1e-4
"""Relative, of losses in fp32."""
LENGTHS = (5, 40, 19, 64)
"""Of the conversations in two rows, in tokens; the last third of each is trained."""
NUM_STEPS = 20
LARGEST_SHARE = 0.9
"""Of its first value, the loss after the steps on one repeated batch."""


def check_conversations(mesh: Mesh) -> Outcome:
    """Compare validation with float64 on the host, then train with noise, smoothing and samples that weigh alike."""
    from configs.sections.sft import SftSection
    from trainer.stages.sft import ACCURACY, ConversationEvaluation, ConversationObjective

    config = build_config("fp32", data={"document_mask": True})
    problems, worst = [], 0.0
    with open_engine(config, mesh) as engine:
        for weighting in ("token", "sample"):
            sft = SftSection(weighting=weighting, neftune_alpha=5.0, label_smoothing=0.1)
            evaluated = ConversationEvaluation(sft)
            batch = evaluated.finish(make_batch(config.model.vocab_size))
            loss, accuracy = _define(engine, batch, weighting)
            found = engine.sum_losses([batch], evaluated)
            worst = max(worst, abs(found.mean - loss) / loss)
            if found.means[ACCURACY] != accuracy:
                problems.append(
                    f"by {weighting}: an accuracy of {found.means[ACCURACY]:.3f}, and {accuracy:.3f} is right"
                )
            objective = ConversationObjective(sft)
            losses = [engine.train_step([batch], objective, 3e-3).loss for _ in range(NUM_STEPS)]
            if not losses[-1] < LARGEST_SHARE * losses[0]:
                problems.append(f"by {weighting}: the loss went from {losses[0]:.4f} to {losses[-1]:.4f}")
    # `not <=`, so that a NaN is a problem too
    if not worst <= TOLERANCE:
        problems.append(f"losses differ by {worst:.1e} of them from float64 (limit {TOLERANCE:g})")
    return judge("conversations", problems, f"largest relative difference {worst:.1e}", {"difference": worst})


def make_batch(vocab_size: int, sides: tuple[int, ...] | None = None) -> Any:
    """Return two rows of two conversations each, of random tokens; with `sides`, which answer of its row each is."""
    import numpy as np

    from trainer.data.batch import build_packed_batch

    random = np.random.default_rng(5)
    total = sum(LENGTHS)
    tokens = random.integers(0, vocab_size, total)
    labels = random.integers(0, vocab_size, total)
    positions = np.concatenate([np.arange(length) for length in LENGTHS])
    lengths = np.repeat(LENGTHS, LENGTHS)
    labels[positions * 3 < lengths * 2] = -1
    planes = [tokens, labels, positions]
    if sides is not None:
        planes.append(np.where(labels >= 0, np.repeat(sides, LENGTHS), 0))
    rows = np.stack(planes).reshape(len(planes), 2, total // 2).swapaxes(0, 1)
    return build_packed_batch(np.ascontiguousarray(rows), (0, 1))


def _define(engine: Any, batch: Any, weighting: str) -> tuple[float, float]:
    """Return loss and accuracy from the logits of each conversation alone, in float64 on the host."""
    means, hits, count, start = [], 0, 0, 0
    flat = [part.flatten() for part in (batch.tokens, batch.labels, batch.loss_mask)]
    for length in LENGTHS:
        tokens, labels, mask = (part[start : start + length] for part in flat)
        logits = engine.compute_logits(tokens[None]).cpu().double()[0]
        trained = mask > 0
        losses = -logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0][trained]
        means.append((float(losses.sum()), len(losses)))
        hits += int((logits.argmax(-1) == labels)[trained].sum())
        count += len(losses)
        start += length
    by_token = sum(total for total, _ in means) / count
    by_sample = sum(total / number for total, number in means) / len(means)
    return by_token if weighting == "token" else by_sample, hits / count
