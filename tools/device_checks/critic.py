"""PPO on the device: a critic learns what answers are worth, and with its advantages what is rewarded grows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tools.device_checks.engine import build_config
from tools.device_checks.outcome import Outcome, judge
from tools.device_checks.policy import LEAST_GAIN, NEW_TOKENS, draw_rollouts

if TYPE_CHECKING:
    from parallel.mesh import Mesh

NUM_STEPS, WARMUP_STEPS = 20, 6


def check_critic(mesh: Mesh, compute: str) -> Outcome:
    """Reward tokens of the lower half of the vocabulary, with a critic beside the policy and a divergence rewarded."""
    from types import SimpleNamespace

    from configs.roles import CRITIC, POLICY
    from configs.stages import PpoConfig
    from trainer.engine.build import ModelPlan, build_models
    from trainer.engine.state import TrainState
    from trainer.stages.ppo import PpoStage

    sections: dict[str, Any] = {
        "grpo": {"gate_tolerance": 1.0, "group_size": 1, "num_epochs": 2, "kl": {"coefficient": 0.01}},
        "ppo": {"critic": {"optimizer": {"lr": 3e-3, "min_lr": 3e-3}, "warmup_steps": WARMUP_STEPS}},
        "rollout": {"max_new_tokens": NEW_TOKENS},
        "schedule": {"kind": "constant"},
    }
    small = build_config(compute, data={"document_mask": True}, optimizer={"lr": 3e-3, "min_lr": 3e-3})
    config = PpoConfig.model_validate(small.model_dump() | sections)
    critics = config.model_copy(update={"optimizer": config.ppo.critic.optimizer})
    plans = {POLICY: ModelPlan(config, is_trained=True), CRITIC: ModelPlan(critics, is_trained=True, head="scalar")}
    models: Any = build_models(plans, mesh)

    def collect(prompts: Any, step: int, first: int, seconds: Any) -> list[Any]:
        seconds.reports.append(SimpleNamespace(replicas=(), seconds=0.0, num_tokens=0))
        return draw_rollouts(models[POLICY], config.model.vocab_size, step)

    reader: Any = SimpleNamespace(draw=lambda count: [], num_too_long=0)
    collector: Any = SimpleNamespace(collect=collect, spell=str, close=lambda: None)
    stage = PpoStage(models[CRITIC], config, models[POLICY], reader, (), collector)
    stage.start(TrainState())
    state, rows = TrainState(), []
    for _ in range(NUM_STEPS):
        result = stage.step(state)
        state = state.after(result)
        rows.append(result.metrics)
    for model in models.values():
        model.close()
    return _judge(compute, rows)


def _judge(compute: str, rows: list[dict[str, float]]) -> Outcome:
    problems = []
    losses, shares = ([row[name] for row in rows] for name in ("critic/vf_loss", "critic/score/mean"))
    if not losses[WARMUP_STEPS - 1] < losses[0] / 2:
        problems.append(
            f"the critic's loss went from {losses[0]:.3f} to {losses[WARMUP_STEPS - 1]:.3f} in its own steps"
        )
    if not shares[-1] >= shares[0] + LEAST_GAIN:
        problems.append(f"the rewarded share went from {shares[0]:.3f} to {shares[-1]:.3f}, it should have grown")
    if not rows[-1]["objective/kl"] > 1e-3:
        problems.append(f"the divergence from the reference is {rows[-1]['objective/kl']:.1e}")
    found = f"value loss {losses[0]:.3f} -> {losses[-1]:.3f}, rewarded share {shares[0]:.2f} -> {shares[-1]:.2f}"
    figures = {"first_loss": losses[0], "last_loss": losses[-1], "first_share": shares[0], "last_share": shares[-1]}
    return judge(f"{compute} critic", problems, found, figures)
