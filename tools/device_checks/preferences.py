"""Preferences in packed pairs: the reference's scores and the losses of pairs against float64, and they learn."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from tools.device_checks.conversations import LARGEST_SHARE, LENGTHS, NUM_STEPS, TOLERANCE, make_batch
from tools.device_checks.engine import build_config
from tools.device_checks.outcome import Outcome, judge
from tools.one_rank import open_engine

if TYPE_CHECKING:
    from parallel.mesh import Mesh

BETA = 0.5


def check_preferences(mesh: Mesh) -> Outcome:
    """Score answers, learn by DPO and by KTO, and compare what is then said of them with float64 on the host."""
    from configs.sections.preference import PreferenceSection
    from trainer.data.packed_source import CHOSEN, MISMATCHED, REJECTED
    from trainer.rl.reference_scores import ReferenceScores
    from trainer.stages.preference import PreferenceObjective

    config = build_config("fp32", data={"document_mask": True})
    problems, worst = [], 0.0
    sides = {"dpo": (CHOSEN, REJECTED, CHOSEN, REJECTED), "kto": (CHOSEN, MISMATCHED, REJECTED, MISMATCHED)}
    with open_engine(config, mesh) as engine:
        for name in ("dpo", "kto"):
            batch = make_batch(config.model.vocab_size, sides[name])
            reference = ReferenceScores(mesh)
            reference.remember(engine, [_Once(batch)])
            frozen = _score(engine, batch)
            objective = PreferenceObjective(PreferenceSection(loss=name, beta=BETA).method, reference, mesh.cp_group)
            finished = objective.finish(batch)
            kept = finished.sequences["reference"].tolist()
            differences = [abs(one - other) / abs(other) for one, other in zip(kept, frozen, strict=True)]
            losses = []
            for _ in range(NUM_STEPS):
                [prepared] = objective.prepare(engine, [finished])
                losses.append(engine.train_step([prepared], objective, 3e-3).loss)
            [prepared] = objective.prepare(engine, [finished])
            found = engine.sum_losses([prepared], objective).mean
            expected = _define(name, [a - b for a, b in zip(_score(engine, batch), frozen, strict=True)])
            worst = max([worst, *differences, abs(found - expected) / max(expected, 0.01)])
            if not min(losses) < LARGEST_SHARE * losses[0]:  # kto's comes back, as mismatched answers gain too
                problems.append(f"{name}: the loss began at {losses[0]:.4f} and was never below {min(losses):.4f}")
    # `not <=`, so that a NaN is a problem too
    if not worst <= TOLERANCE:
        problems.append(f"scores or losses differ by {worst:.1e} of them from float64 (limit {TOLERANCE:g})")
    return judge("preferences", problems, f"largest relative difference {worst:.1e}", {"difference": worst})


class _Once:
    """Reads one batch."""

    def __init__(self, batch: Any) -> None:
        self._batch = batch

    def batches(self) -> Any:
        """Yield it with its answers numbered."""
        from trainer.data.sequences import with_sequences

        yield with_sequences(self._batch)


def _score(engine: Any, batch: Any) -> list[float]:
    """Return the log-probability of each answer by itself, in float64 on the host."""
    scores, start = [], 0
    flat = [part.flatten() for part in (batch.tokens, batch.labels, batch.loss_mask)]
    for length in LENGTHS:
        tokens, labels, mask = (part[start : start + length] for part in flat)
        logits = engine.compute_logits(tokens[None]).cpu().double()[0]
        own = logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]
        scores.append(float(own[mask > 0].sum()))
        start += length
    return scores


def _define(name: str, ratios: list[float]) -> float:
    """Return the mean loss of log-ratios, written out; of KTO's answers the first is good, the second bad."""
    if name == "dpo":
        return sum(math.log1p(math.exp(BETA * (ratios[pair + 1] - ratios[pair]))) for pair in (0, 2)) / 2
    divergence = max(0.0, (ratios[1] + ratios[3]) / 2)
    good, bad = BETA * (ratios[0] - divergence), BETA * (divergence - ratios[2])
    return (1 / (1 + math.exp(good)) + 1 / (1 + math.exp(bad))) / 2
