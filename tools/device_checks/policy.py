"""Reinforcement learning on the device: generation and training agree on probabilities, and what is rewarded grows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tools.device_checks.engine import build_config
from tools.device_checks.outcome import Outcome, judge
from tools.one_rank import open_engine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from parallel.mesh import Mesh

TOLERANCES = {"fp32": 1e-4, "bf16": 0.05, "fp16": 0.01}
"""Mean distance in nats of log-probabilities by generation and by the training forward pass."""
NUM_STEPS, NUM_PROMPTS, GROUP, NEW_TOKENS = 12, 4, 8, 12
LEAST_GAIN = 0.1
"""What the share of rewarded tokens must grow by."""


def check_policy(mesh: Mesh, compute: str) -> Outcome:
    """Reward tokens of the lower half of the vocabulary, with GRPO's loss, its reference and truncated weights."""
    from configs.sections.grpo import GrpoSection
    from trainer.rl.objective import PolicyObjective
    from trainer.rl.reference import ReferenceWeights

    config = build_config(compute, data={"document_mask": True}, optimizer={"lr": 3e-3, "min_lr": 3e-3})
    method = GrpoSection(algorithm="grpo", importance_cap=2.0).method
    problems: list[str] = []
    with open_engine(config, mesh) as engine:
        objective = PolicyObjective(method, temperature=1.0, max_new_tokens=NEW_TOKENS, cp_group=mesh.cp_group)
        reference = ReferenceWeights(engine)
        reference.remember()
        shares, differences, divergences = [], [], []
        for step in range(NUM_STEPS):
            rollouts = draw_rollouts(engine, config.model.vocab_size, step)
            shares.append(sum(one.score for one in rollouts) / len(rollouts))
            batches, difference = _lay_out(engine, objective, rollouts, reference)
            result = engine.train_step(batches, objective, 3e-3)
            differences.append(difference)
            divergences.append(result.metrics["actor/kl"])
    worst = max(differences)
    if not worst <= TOLERANCES[compute]:
        problems.append(f"log-probabilities differ by {worst:.1e} nats on average (limit {TOLERANCES[compute]:g})")
    if not shares[-1] >= shares[0] + LEAST_GAIN:
        problems.append(f"the rewarded share went from {shares[0]:.3f} to {shares[-1]:.3f}, it should have grown")
    if not abs(divergences[0]) < 1e-3 < divergences[-1]:
        problems.append(f"the divergence from the reference went from {divergences[0]:.1e} to {divergences[-1]:.1e}")
    found = f"rewarded share {shares[0]:.2f} -> {shares[-1]:.2f}, log-probabilities within {worst:.1e} nats"
    figures = {"first_share": shares[0], "last_share": shares[-1], "difference": worst}
    return judge(f"{compute} policy", problems, found, figures)


def draw_rollouts(engine: Any, vocab_size: int, step: int) -> list[Any]:
    """Return a group of answers to each made-up prompt, scored by their share of rewarded tokens."""
    from trainer.generate.generator import EngineGenerator
    from trainer.generate.sampling import Sampling
    from trainer.rl.rollout import Rollout

    prompts = [[1 + number, 7, 3] for number in range(NUM_PROMPTS)]
    sampling = Sampling(NEW_TOKENS, num_samples=GROUP)
    keys = [(step, number) for number in range(NUM_PROMPTS)]
    rollouts = []
    for one in EngineGenerator(engine).generate(prompts, sampling, keys=keys):
        prompt = prompts[one.prompt]
        rollouts.append(
            Rollout(
                source="made up",
                row=one.prompt,
                group=one.prompt,
                sample=one.sample,
                token_ids=[*prompt, *one.token_ids],
                is_sampled=[False] * len(prompt) + [True] * len(one.token_ids),
                log_probs=one.full_logprobs,
                finish=one.finish,
                texts=("",),
                score=sum(token < vocab_size // 2 for token in one.token_ids) / len(one.token_ids),
                rewards={},
                faults={},
            )
        )
    return rollouts


def _lay_out(engine: Any, objective: Any, rollouts: Sequence[Any], reference: Any) -> tuple[list[Any], float]:
    """Return the microbatches of an update, and how far generation and training are apart."""
    import numpy as np

    from configs.sections.grpo import GrpoSection
    from configs.sections.rollout import RolloutSection
    from configs.stages import GrpoConfig
    from trainer.rl.objective import ADVANTAGES, REFERENCE
    from trainer.rl.update import PolicyUpdates

    sections = {"grpo": GrpoSection(algorithm="grpo"), "rollout": RolloutSection(max_new_tokens=NEW_TOKENS)}
    config = GrpoConfig.model_validate(engine.config.model_dump() | sections)
    updates = PolicyUpdates(config, engine, objective)
    [minibatch] = updates.cut(rollouts)
    scored = updates.score([minibatch])
    distances = [np.abs(scored[one.key][one.trained()] - np.array(one.log_probs)) for one in rollouts]
    columns = {
        ADVANTAGES: updates.advantages(rollouts),
        REFERENCE: updates.score([minibatch], reference),
    }
    return updates.with_columns(minibatch, columns), float(np.concatenate(distances).mean())
