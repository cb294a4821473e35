"""What a step of reinforcement learning reports, under the names that the field's trainers use (verl's)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from trainer.engine.state import StepResult
from trainer.generate.report import GenerationReport
from trainer.rl.advantages import find_equal_groups
from trainer.rl.rollout import Rollout, Values


def describe_rollouts(rollouts: Sequence[Rollout], advantages: Values | None) -> dict[str, float]:
    """Return figures of a step's rollouts; those of scores are over rollouts whose rewards did not fail.

    `advantages` are those of predictions; None where there are none.
    """
    scored = [rollout for rollout in rollouts if rollout.score is not None]
    figures = _spread("response_length", [rollout.num_sampled for rollout in rollouts])
    figures["response_length/clip_ratio"] = _mean([rollout.finish == "length" for rollout in rollouts])
    figures["prompt_length/mean"] = _mean([rollout.is_sampled.index(True) for rollout in rollouts])
    figures |= _spread("critic/score", [rollout.score for rollout in scored if rollout.score is not None])
    if advantages is not None:
        trained = [advantages[rollout.key][rollout.trained()] for rollout in scored if rollout.key in advantages]
        figures |= _spread("critic/advantages", np.concatenate(trained) if trained else [])
    for name in sorted({name for rollout in rollouts for name in rollout.rewards}):
        values = [value for rollout in rollouts if (value := rollout.rewards.get(name)) is not None]
        figures[f"reward/{name}/mean"] = _mean(values)
    figures["reward/num_failed"] = float(len(rollouts) - len(scored))
    groups = np.array([rollout.group for rollout in scored], dtype=np.int64)
    equal = find_equal_groups(np.array([rollout.score for rollout in scored], dtype=np.float64), groups)
    figures["rollout/num_groups"] = float(len({rollout.group for rollout in rollouts}))
    figures["rollout/num_equal_groups"] = float(len(np.unique(groups[equal])))
    return figures


def describe_rewards(rollouts: Sequence[Rollout], divergences: Values | None, coefficient: float) -> dict[str, float]:
    """Return figures of what answers are rewarded with: their scores, less the divergence where that is rewarded too.

    `divergences` are those of predictions; without a reward for them the loss reports what there is.
    """
    scored = [(rollout, rollout.score) for rollout in rollouts if rollout.score is not None]
    if divergences is None:
        return _spread("critic/rewards", [score for _, score in scored])
    drawn = [divergences[rollout.key][rollout.trained()] for rollout, _ in scored]
    rewards = [score - coefficient * float(own.sum()) for (_, score), own in zip(scored, drawn, strict=True)]
    return _spread("critic/rewards", rewards) | {"actor/kl": _mean(np.concatenate(drawn)) if drawn else 0.0}


def describe_work(
    num_trained: int, seconds: Mapping[str, float], reports: Sequence[GenerationReport]
) -> dict[str, float]:
    """Return what a step's phases took and yielded; `num_trained` are the tokens of all its updates.

    The idle share is that of the replicas' time in generation, in which a replica waits for the slowest.
    """
    update = seconds["forward_backward"] + seconds["optimizer"]
    slowest = sum(report.seconds for report in reports)
    num_drawn = sum(report.num_tokens for report in reports)
    idle = {}
    for replica in range(len(reports[0].replicas)):
        busy = sum(report.replicas[replica].seconds for report in reports)
        idle[f"rollout/idle_share/dp_{replica}"] = 1 - busy / slowest if slowest else 0.0
    return {
        "timing_s/generate_sequences": seconds["generate"],
        "timing_s/reward": seconds["reward"],
        "timing_s/score": seconds["score"],
        "timing_s/update_actor": update,
        "timing_s/step": sum(seconds.values()),
        "perf/generated_tokens_per_second": num_drawn / seconds["generate"] if seconds["generate"] else 0.0,
        "perf/trained_tokens_per_second": num_trained / update if update else 0.0,
        **idle,
    }


def find_useful_groups(rollouts: Sequence[Rollout]) -> set[int]:
    """Return the groups whose scores are not all one."""
    scored = [rollout for rollout in rollouts if rollout.score is not None]
    groups = np.array([rollout.group for rollout in scored], dtype=np.int64)
    equal = find_equal_groups(np.array([rollout.score for rollout in scored], dtype=np.float64), groups)
    return set(groups[~equal].tolist())


def combine(results: Sequence[StepResult]) -> StepResult:
    """Return the updates of one step as one result: sums of what is counted, means of what is a mean.

    A step is applied when all of its updates were, but for those that had nothing to learn from.
    """
    last = results[-1]
    count, tokens = (sum(one.count for one in results), sum(one.num_tokens for one in results))
    informed = [one for one in results if not one.is_empty] or list(results)
    names = last.metrics
    return replace(
        last,
        loss=sum(one.loss * one.count for one in results) / count if count else 0.0,
        count=count,
        num_tokens=tokens,
        num_input_tokens=sum(one.num_input_tokens for one in results),
        num_attended_pairs=sum(one.num_attended_pairs for one in results),
        num_samples=sum(one.num_samples for one in results),
        grad_norm=sum(one.grad_norm for one in informed) / len(informed),
        is_applied=all(one.is_applied for one in informed),
        is_overflow_expected=any(one.is_overflow_expected for one in informed),
        loss_scale=results[0].loss_scale,
        metrics={
            name: sum(one.metrics[name] * one.num_tokens for one in results) / tokens if tokens else 0.0
            for name in names
        },
        phase_seconds={name: sum(one.phase_seconds[name] for one in results) for name in last.phase_seconds},
    )


def _spread(name: str, values: Sequence[float] | np.ndarray) -> dict[str, float]:
    if not len(values):
        return {f"{name}/{kind}": 0.0 for kind in ("mean", "max", "min")}
    return {
        f"{name}/mean": float(np.mean(values)),
        f"{name}/max": float(np.max(values)),
        f"{name}/min": float(np.min(values)),
    }


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else 0.0
