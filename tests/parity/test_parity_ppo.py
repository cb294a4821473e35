"""Whole steps of PPO: values, advantages and both updates, by `transformers` in float64, and alike on every layout."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from configs.roles import CRITIC, POLICY
from configs.stages import Config, PpoConfig
from tests.parity.conftest import TOLERANCE, assert_equal_runs
from tests.parity.test_parity_grpo import LAYOUTS
from tests.parity.test_parity_transformers import as_llama, build_llama
from tests.pool import Place
from tests.small_rollouts import make_rollouts
from tests.small_runs import RunRecord, record_run, roughen, small_config, train_steps

NUM_STEPS, TEMPERATURE, CLIP, VALUE_CLIP, GAMMA, LAMBDA, CRITIC_LAMBDA = 3, 0.7, 0.05, 0.3, 0.98, 0.9, 0.97
KL, TARGET, HORIZON, RATE, CRITIC_RATE = 0.2, 0.5, 20.0, 1e-3, 2e-3
FIELDS: dict[str, Any] = {
    "grpo": {
        "num_minibatches": 2, "num_epochs": 2, "gate_tolerance": 1e3, "clip_low": CLIP, "clip_high": CLIP,
        "kl": {"coefficient": KL}, "group_size": 1,
    },
    "ppo": {
        "critic": {
            "optimizer": {"lr": CRITIC_RATE, "min_lr": 0.0, "eps": 1e-6, "clip_grad": 2.0}, "value_clip": VALUE_CLIP,
            "warmup_steps": 1,
        },
        "gamma": GAMMA, "gae_lambda": LAMBDA, "critic_lambda": CRITIC_LAMBDA,
        "adaptive_kl": {"target": TARGET, "horizon": HORIZON},
    },
    "rollout": {"temperature": TEMPERATURE, "max_new_tokens": 20},
    "optimizer": {"lr": RATE, "min_lr": 0.0, "eps": 1e-6},
    "schedule": {"kind": "constant"},
}  # fmt: skip
TRAIN = {"seq_len": 40, "micro_batch_size": 2}
TOLD = (
    "critic/vf_loss", "critic/vf_clipfrac", "critic/vpred_mean", "critic/grad_norm", "critic/values/mean",
    "critic/returns/mean", "critic/vf_explained_var", "critic/rewards/mean", "actor/pg_loss", "actor/ppo_kl",
    "actor/clip_frac", "actor/kl", "objective/kl", "actor/reward_kl_penalty_coeff",
)  # fmt: skip


@dataclass(frozen=True)
class PpoRecord(RunRecord):
    """What the steps did, and what the critic then says."""

    metrics: list[dict[str, float]]
    values: dict[Any, np.ndarray]


def ppo_config(config: Config) -> PpoConfig:
    """Return the config with what the steps need."""
    return PpoConfig.model_validate({**config.model_dump(), **FIELDS})


@contextlib.contextmanager
def open_models(place: Place, config: PpoConfig) -> Iterator[Any]:
    """Join the ranks and yield policy and critic on them; both have a body of the same random weights."""
    from parallel.mesh import build_mesh, init_world
    from parallel.platform import load_platform
    from trainer.engine.build import ModelPlan, build_models

    platform = load_platform("cpu")
    device = platform.activate(0)
    init_world(platform, config, rank=place.rank, world_size=place.world_size, init_method=place.init_method)
    own = config.model_copy(update={"optimizer": config.ppo.critic.optimizer})
    plans = {POLICY: ModelPlan(config, is_trained=True), CRITIC: ModelPlan(own, is_trained=True, head="scalar")}
    models = build_models(plans, build_mesh(platform, device, config))
    try:
        yield models
    finally:
        for model in models.values():
            model.close()


def build_stage(models: Any, config: PpoConfig) -> Any:
    """Return the stage, whose rollouts are the same at every step."""
    from trainer.stages.ppo import PpoStage

    def collect(prompts: Any, step: int, first: int, seconds: Any) -> list[Any]:
        seconds.reports.append(SimpleNamespace(replicas=(), seconds=0.0, num_tokens=0))
        return make_rollouts()

    reader: Any = SimpleNamespace(draw=lambda count: [], num_too_long=0)
    collector: Any = SimpleNamespace(collect=collect, spell=lambda ids: "", close=lambda: None)
    return PpoStage(models[CRITIC], config, models[POLICY], reader, (), collector)


def take_steps(place: Place, config: Config, run_dir: str, masks: str) -> PpoRecord:
    """Take whole steps from the seed's weights, of which the critic has the body."""
    from trainer.checkpoint.layout import resolve_checkpoint
    from trainer.checkpoint.load import warm_start
    from trainer.engine.forward import forward_values
    from trainer.engine.state import TrainState
    from trainer.rl.update import score_rollouts

    ppo = ppo_config(config)
    with open_models(place, ppo) as models:
        for model in models.values():
            warm_start(model, resolve_checkpoint(run_dir))
        stage = build_stage(models, ppo)
        stage.start(TrainState())
        _, results = train_steps(stage, TrainState(), NUM_STEPS)
        values = score_rollouts(models[CRITIC], stage._updates.cut(make_rollouts()), forward_values)
        record = record_run(models[POLICY], results)
        return PpoRecord(**vars(record), metrics=[result.metrics for result in results], values=dict(values))


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in ("one", "cp2_dp2", "dp2_overlap")])
def test_whole_steps_are_alike_on_every_layout(judge, layout):
    world, parallel, model = LAYOUTS[layout]
    one = judge.run(1, {}, case=take_steps, model=model, train=TRAIN)
    run = judge.run(world, parallel, case=take_steps, model=model, train=TRAIN)
    # the policy's loss is a mean of whitened advantages, nearly 0
    np.testing.assert_allclose(run.losses, one.losses, rtol=TOLERANCE, atol=TOLERANCE / 10)
    assert_equal_runs(replace(run, losses=one.losses), one)
    for found, expected in zip(run.metrics, one.metrics, strict=True):
        for name in TOLD:
            if name in expected:
                assert found[name] == pytest.approx(expected[name], rel=10 * TOLERANCE, abs=10 * TOLERANCE), name
    for key, own in one.values.items():
        np.testing.assert_allclose(run.values[key], own, rtol=0, atol=20 * TOLERANCE)


class PlainPpo:
    """PPO rollout by rollout with loops, on two of `transformers`' models in float64; knows nothing of the trainer."""

    def __init__(self, policy: Any, critic: Any, reference: Any) -> None:
        self.policy, self.critic, self.reference, self.kl = policy, critic, reference, KL
        self.optimizers = {
            id(model): build_adamw(model, rate) for model, rate in ((policy, RATE), (critic, CRITIC_RATE))
        }

    def log_probs(self, model: Any, rollout: Any) -> Any:
        """Return those of the tokens drawn."""
        import torch

        ids = torch.tensor([rollout.token_ids])
        logits = model(ids[:, :-1]).logits[0] / TEMPERATURE
        every = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        return every[torch.tensor(rollout.is_sampled[1:])]

    def values(self, rollout: Any) -> Any:
        """Return the value before each token that was drawn."""
        import torch

        ids = torch.tensor([rollout.token_ids])
        return self.critic(ids[:, :-1]).logits[0, :, 0][torch.tensor(rollout.is_sampled[1:])]

    def step(self, rollouts: list[Any], *, is_warm_up: bool) -> dict[str, float]:
        """Take one step and return its figures."""
        import torch

        with torch.no_grad():
            old = [self.log_probs(self.policy, one) for one in rollouts]
            held = [self.log_probs(self.reference, one) for one in rollouts]
            before = [self.values(one) for one in rollouts]
        advantages, returns, rewarded = [], [], []
        for one, p, q, v in zip(rollouts, old, held, before, strict=True):
            rewards = (-self.kl * (p - q)).tolist()
            rewards[-1] += one.score
            rewarded.append(sum(rewards))
            advantages.append(recurse(rewards, v.tolist(), LAMBDA))
            returns.append(
                [a + b for a, b in zip(recurse(rewards, v.tolist(), CRITIC_LAMBDA), v.tolist(), strict=True)]
            )
        flat = np.concatenate(advantages)
        advantages = [(np.array(own) - flat.mean()) / (flat.std(ddof=1) + 1e-6) for own in advantages]
        learnt, said = np.concatenate(returns), torch.cat(before).numpy()
        figures = {
            "critic/values/mean": said.mean(), "critic/returns/mean": learnt.mean(),
            "critic/vf_explained_var": 1 - np.var(learnt - said) / np.var(learnt),
            "critic/rewards/mean": np.mean(rewarded),
            "actor/kl": float(torch.cat([p - q for p, q in zip(old, held, strict=True)]).mean()),
        }  # fmt: skip
        halves = [range(7), range(7, 14)] * 2
        figures |= self.update_critic(rollouts, halves, before, returns)
        if not is_warm_up:
            figures |= self.update_policy(rollouts, halves, old, advantages)
            apart = float(np.mean([float((p - q).sum()) for p, q in zip(old, held, strict=True)]))
            figures |= {"objective/kl": apart, "actor/reward_kl_penalty_coeff": self.kl}
            self.kl *= 1 + min(max(apart / TARGET - 1, -0.2), 0.2) * len(rollouts) / HORIZON
        return figures

    def update_critic(self, rollouts: Any, halves: Any, before: Any, returns: Any) -> dict[str, float]:
        """Learn the returns."""
        import torch

        rows, norms = [], []
        for half in halves:
            new = torch.cat([self.values(rollouts[i]) for i in half])
            old, goal = torch.cat([before[i] for i in half]), torch.tensor(np.concatenate([returns[i] for i in half]))
            held = torch.maximum(torch.minimum(new, old + VALUE_CLIP), old - VALUE_CLIP)
            free, clipped = (new - goal) ** 2, (held - goal) ** 2
            losses = 0.5 * torch.maximum(free, clipped)
            norms.append(self.descend(self.critic, losses.mean(), 2.0))
            rows.append((len(new), losses.mean(), (clipped > free).double().mean(), new.mean()))
        names = ("critic/vf_loss", "critic/vf_clipfrac", "critic/vpred_mean")
        return weighted(names, rows) | {"critic/grad_norm": float(np.mean(norms))}

    def update_policy(self, rollouts: Any, halves: Any, old: Any, advantages: Any) -> dict[str, float]:
        """Follow the advantages."""
        import torch

        rows, norms = [], []
        for half in halves:
            new, was = (
                torch.cat([self.log_probs(self.policy, rollouts[i]) for i in half]),
                torch.cat([old[i] for i in half]),
            )
            worth = torch.tensor(np.concatenate([advantages[i] for i in half]))
            ratio = torch.exp(new - was)
            free, clipped = ratio * worth, torch.clamp(ratio, 1 - CLIP, 1 + CLIP) * worth
            losses = -torch.minimum(free, clipped)
            norms.append(self.descend(self.policy, losses.mean(), 1.0))
            rows.append((len(new), losses.mean(), (was - new).mean(), (clipped < free).double().mean()))
        figures = weighted(("actor/pg_loss", "actor/ppo_kl", "actor/clip_frac"), rows)
        return figures | {"grad_norm": float(np.mean(norms)), "loss": figures["actor/pg_loss"]}

    def descend(self, model: Any, loss: Any, clip: float) -> float:
        """Take one step of AdamW and return the norm of the gradient before clipping."""
        import torch

        optimizer = self.optimizers[id(model)]
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        return float(norm)


def recurse(rewards: list[float], values: list[float], lam: float) -> list[float]:
    """Return generalized advantages, backwards."""
    found, after, following = [], 0.0, 0.0
    for reward, value in zip(reversed(rewards), reversed(values), strict=True):
        after = reward + GAMMA * following - value + GAMMA * lam * after
        following = value
        found.append(after)
    return found[::-1]


def weighted(names: Any, rows: Any) -> dict[str, float]:
    """Return means over all tokens of all updates."""
    total = sum(row[0] for row in rows)
    return {name: sum(row[0] * float(row[1 + i].detach()) for row in rows) / total for i, name in enumerate(names)}


def build_adamw(model: Any, rate: float) -> Any:
    """Return AdamW with the config's settings; norm weights do not decay."""
    import torch

    groups = [
        {"params": [one for one in model.parameters() if one.dim() > 1], "weight_decay": 0.1},
        {"params": [one for one in model.parameters() if one.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), eps=1e-6)


def compare_with_plain(place: Place, config: Config) -> list[tuple[dict[str, float], dict[str, float]]]:
    """Return by step our figures and those of the judge, and last both models' outputs after all steps."""
    import torch

    from trainer.engine.forward import forward_values
    from trainer.engine.state import TrainState
    from trainer.rl.update import score_rollouts

    ppo = ppo_config(config)
    with open_models(place, ppo) as models:
        for engine in models.values():
            roughen(engine)
        named = {
            role: {name: one.data.clone() for name, one in model.chunks[0].named_parameters()}
            for role, model in models.items()
        }
        head = named[CRITIC].pop("output_layer.weight")
        assert head.shape == (1, config.model.hidden_size)
        critic = build_llama(config, as_llama(named[POLICY] | named[CRITIC], config))
        critic.lm_head = torch.nn.Linear(head.shape[1], 1, bias=False).double()
        critic.lm_head.weight.data.copy_(head)
        plain = PlainPpo(*(build_llama(config, as_llama(named[POLICY], config)) for _ in "p"), critic, None)
        plain.reference = build_llama(config, as_llama(named[POLICY], config))
        stage = build_stage(models, ppo)
        stage.start(TrainState())
        _, results = train_steps(stage, TrainState(), NUM_STEPS)
        rollouts = make_rollouts()
        pairs = []
        for number, result in enumerate(results):
            ours = {**result.metrics, "loss": result.loss, "grad_norm": result.grad_norm}
            pairs.append((ours, plain.step(rollouts, is_warm_up=number < 1)))
        values = score_rollouts(models[CRITIC], stage._updates.cut(rollouts), forward_values)
        scores = stage._updates.score(stage._updates.cut(rollouts))
        ours, theirs = {}, {}
        for one in rollouts:
            for kind, found, expected in (
                ("value", values, plain.values(one)), ("log", scores, plain.log_probs(plain.policy, one)),
            ):  # fmt: skip
                drawn = found[one.key][one.trained()]
                ours |= {f"{kind}{one.key}{i}": float(x) for i, x in enumerate(drawn)}
                theirs |= {f"{kind}{one.key}{i}": float(x) for i, x in enumerate(expected)}
        return [*pairs, (ours, theirs)]


def test_whole_steps_are_those_of_plain_loops_in_float64(ranks):
    (pairs,) = ranks.run(compare_with_plain, small_config(train=TRAIN))
    *steps, (ours, theirs) = pairs
    for number, (found, expected) in enumerate(steps):
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=2e-4, abs=2e-5), (number, name)
    assert set(TOLD) <= set(steps[-1][1]), "what is not compared proves nothing"
    assert steps[1][1]["actor/clip_frac"] > 0.02 and steps[1][1]["critic/vf_clipfrac"] > 0.02
    assert ours.keys() == theirs.keys()
    assert max(abs(ours[name] - theirs[name]) for name in ours) < 2e-3
