"""Updates of a policy on packed rollouts are, on every layout, those of the objective, rollout by rollout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from configs.stages import Config, GrpoConfig
from tests.parity.conftest import TOLERANCE, assert_equal_runs
from tests.pool import Place
from tests.small_rollouts import make_rollouts
from tests.small_runs import RunRecord, open_engine, record_run

TEMPERATURE, MAX_NEW_TOKENS, RATE = 0.7, 20, 1e-3
# One update each, one after the other on the same weights.
METHODS: dict[str, dict[str, Any]] = {
    "grpo": {"kl": {"coefficient": 0.5}},
    "dapo": {"algorithm": "dapo", "entropy_bonus": 0.05, "importance_cap": 1.3},
    "dr_grpo": {"algorithm": "dr_grpo", "clip_low": 0.1},
    "on_policy": {"algorithm": "dr_grpo", "importance_cap": 2.0},
    "gspo": {"algorithm": "gspo", "clip_low": 0.02, "clip_high": 0.03},
    "cispo": {"algorithm": "cispo", "clip_high": 0.1},
    "rloo": {"algorithm": "rloo", "kl": {"coefficient": 0.2}},
    "reinforce_pp": {"algorithm": "reinforce_pp"},
    "answers_by_token": {
        "algorithm": "reinforce_pp_baseline", "ratio": "sequence", "clip_low": 0.05, "clip_high": 0.05,
        "kl": {"coefficient": 0.1}, "entropy_bonus": 0.01,
    },
}  # fmt: skip
MOE = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 64, "balancing": "none"}  # which padding would take part in
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one": (1, {}, {}),
    "tp2": (2, {"tp": 2}, {}),
    "tp2_sp": (2, {"tp": 2, "sp": True}, {}),
    "pp2": (2, {"pp": 2}, {}),
    "pp2_vpp2": (2, {"pp": 2, "vpp": 2}, {}),
    "dp2": (2, {}, {}),
    "dp2_overlap": (2, {"overlap_grad_reduce": True, "overlap_param_gather": True}, {}),
    "cp2": (2, {"cp": 2}, {}),
    "cp2_dp2": (4, {"cp": 2}, {}),
    "ep2": (2, {"ep": 2}, {"moe": MOE}),
}


@dataclass(frozen=True)
class UpdateRecord(RunRecord):
    """What the updates did, and what they were told."""

    metrics: list[dict[str, float]]
    scores: list[dict[Any, np.ndarray]]
    """Log-probabilities by the policy before each update."""


def grpo_config(config: Config, method: Mapping[str, Any]) -> GrpoConfig:
    """Return the config with a method."""
    rollout = {"temperature": TEMPERATURE, "max_new_tokens": MAX_NEW_TOKENS}
    return GrpoConfig.model_validate({**config.model_dump(), "grpo": method, "rollout": rollout})


def disturb(values: Mapping[Any, np.ndarray]) -> dict[Any, np.ndarray]:
    """Return log-probabilities as another policy, that gave the answers, might have had them."""
    return {key: own + np.random.default_rng([9, *key]).normal(0, 0.15, len(own)) for key, own in values.items()}


class WrittenOut:
    """The objective of one rollout in a batch of its own, as the papers have it; knows no shares, columns or ranks."""

    mean_names = (
        "actor/pg_loss", "actor/entropy", "actor/ppo_kl", "actor/clip_frac", "rollout/logprob_difference", "actor/kl",
        "rollout/importance_weight",
    )  # fmt: skip

    def __init__(self, method: Any) -> None:
        self._method = method

    def forward(self, model: Any, batch: Any) -> Any:
        """Return log-probabilities and entropies."""
        import torch

        from trainer.engine.forward import score_language_model

        scores = score_language_model(model, batch, temperature=TEMPERATURE, entropy=True)
        return torch.stack([scores.log_probs, scores.entropy])

    def count(self, batch: Any) -> Any:
        """Return the tokens that were drawn, or the answer."""
        import torch

        is_by_token = self._method.normalisation == "token_mean"
        return torch.tensor(int(batch.loss_mask.sum()) if is_by_token else 1, dtype=torch.int32)

    def loss(self, output: Any, batch: Any) -> Any:
        """Return the loss of the tokens that were drawn."""
        import torch

        from trainer.losses.loss import Loss, Mean

        method, is_drawn = self._method, batch.loss_mask > 0
        new, entropy = (one[is_drawn] for one in output)
        given = {name: column[is_drawn] for name, column in batch.columns.items()}
        old, advantages = given.get("old_log_probs", new.detach()), given["advantages"]
        ratio = torch.exp(new - old)
        if method.ratio == "sequence":
            ratio = torch.exp((new - old).mean()).expand(len(new))
        clipped = torch.minimum(torch.clamp_min(ratio, 1 - method.clip_low), torch.tensor(1 + method.clip_high))
        if method.surrogate == "cispo":
            policy_loss, is_clipped = -clipped.detach() * advantages * new, clipped != ratio
        else:
            free = ratio * advantages
            is_clipped = ((ratio > 1 + method.clip_high) & (advantages > 0)) | (
                (ratio < 1 - method.clip_low) & (advantages < 0)
            )
            policy_loss = -torch.where(is_clipped, clipped * advantages, free)
        weights = torch.exp(old.detach() - given["sampled_log_probs"])
        if method.importance_cap is not None:
            weights = weights.clamp(max=method.importance_cap)
            policy_loss = policy_loss * weights
        distance = new - given["reference_log_probs"]
        divergence = distance**2 / 2 if method.kl_estimator == "k2" else torch.exp(-distance) + distance - 1
        tokens = policy_loss - method.entropy_bonus * entropy
        if method.kl_place == "loss":
            tokens = tokens + method.kl_coefficient * divergence
        divisor = {"sequence_mean": len(new), "constant": MAX_NEW_TOKENS}.get(method.normalisation, 1)
        figures = (
            policy_loss, entropy, old - new, is_clipped.float(), (old - given["sampled_log_probs"]).abs(), divergence,
            weights,
        )  # fmt: skip
        count = torch.tensor(len(new))
        means = {
            name: Mean(figure.detach().sum(), count) for name, figure in zip(self.mean_names, figures, strict=True)
        }
        return Loss(tokens.sum() / divisor, means)


def build_alone(rollout: Any, columns: Mapping[str, np.ndarray]) -> Any:
    """Return a rollout as a batch of one row as long as it is, plain causal attention over it."""
    import torch

    from trainer.data.batch import Batch

    ids = torch.tensor([rollout.token_ids])
    drawn = torch.tensor([rollout.is_sampled])[:, 1:]
    laid = {name: torch.from_numpy(column.astype(np.float32))[None] for name, column in columns.items()}
    positions = torch.arange(ids.shape[1] - 1)[None]
    return Batch(ids[:, :-1], ids[:, 1:], positions, drawn.float(), columns=laid, sample_ids=(0,))


def score_alone(engine: Any, rollouts: Sequence[Any]) -> dict[Any, np.ndarray]:
    """Return the log-probabilities of all predictions."""
    from trainer.engine.forward import score_language_model

    outputs = engine.score(
        [build_alone(rollout, {}) for rollout in rollouts],
        lambda model, batch: score_language_model(model, batch, temperature=TEMPERATURE),
    )
    return {rollout.key: one.log_probs[0].numpy() for rollout, one in zip(rollouts, outputs, strict=True)}


def update_alone(place: Place, config: Config, run_dir: str, masks: str) -> UpdateRecord:
    """Update by the written-out objective on rollouts one by one."""
    from trainer.checkpoint.layout import resolve_checkpoint
    from trainer.checkpoint.load import warm_start
    from trainer.rl.update import PolicyUpdates

    with open_engine(place, config) as engine:
        warm_start(engine, resolve_checkpoint(run_dir))
        rollouts, results, scores = make_rollouts(), [], []
        reference = score_alone(engine, rollouts)
        for name, fields in METHODS.items():
            updates: Any = PolicyUpdates(grpo_config(config, fields), engine, None)  # type: ignore[arg-type]
            scores.append(score_alone(engine, rollouts))
            old = disturb(scores[-1])
            advantages, batches = updates.advantages(rollouts, updates.divergences(rollouts, old, reference)), []
            for rollout in rollouts:
                columns = {
                    "advantages": advantages[rollout.key], "reference_log_probs": reference[rollout.key],
                    "sampled_log_probs": rollout.lay(rollout.log_probs),
                }  # fmt: skip
                if name != "on_policy":
                    columns["old_log_probs"] = old[rollout.key]
                batches.append(build_alone(rollout, columns))
            results.append(engine.train_step(batches, WrittenOut(updates.method), RATE))
        return make_record(engine, results, scores)


def update_in_rows(place: Place, config: Config, run_dir: str, masks: str) -> UpdateRecord:
    """Update as the stage does, the reference being the weights of the beginning."""
    from trainer.checkpoint.layout import resolve_checkpoint
    from trainer.checkpoint.load import warm_start
    from trainer.rl.objective import ADVANTAGES, OLD, REFERENCE, PolicyObjective
    from trainer.rl.reference import ReferenceWeights
    from trainer.rl.update import PolicyUpdates

    with open_engine(place, grpo_config(config, {})) as engine:
        warm_start(engine, resolve_checkpoint(run_dir))
        rollouts, results, scores = make_rollouts(), [], []
        reference = ReferenceWeights(engine)
        reference.remember()
        for name, fields in METHODS.items():
            grpo = grpo_config(config, fields)
            objective = PolicyObjective(
                grpo.grpo.method, temperature=TEMPERATURE, max_new_tokens=MAX_NEW_TOKENS, cp_group=engine.mesh.cp_group
            )
            updates = PolicyUpdates(grpo, engine, objective)
            (minibatch,) = updates.cut(rollouts)
            scores.append(dict(updates.score([minibatch])))
            held = score_by_reference(engine, updates, minibatch, reference)
            assert all(np.array_equal(held[key], own) for key, own in scores[0].items()), "not the reference's"
            old = disturb(scores[-1])
            advantages = updates.advantages(rollouts, updates.divergences(rollouts, old, held))
            columns = {ADVANTAGES: advantages, REFERENCE: held}
            if name != "on_policy":
                columns[OLD] = old
            results.append(engine.train_step(updates.with_columns(minibatch, columns), objective, RATE))
        return make_record(engine, results, scores)


def score_by_reference(engine: Any, updates: Any, minibatch: Any, reference: Any) -> Any:
    """Return what the reference says, after a look at the policy's weights, which must be the same as before."""
    import torch

    engine.finish_parameter_gather()
    before = [parameter.detach().clone() for chunk in engine.chunks for parameter in chunk.parameters()]
    held = updates.score([minibatch], reference)
    after = [parameter for chunk in engine.chunks for parameter in chunk.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True)), "the policy has changed"
    return held


def make_record(engine: Any, results: Sequence[Any], scores: Any) -> UpdateRecord:
    """Return the record of updates done. Collective: all ranks of the world must call this."""
    record = record_run(engine, list(results))
    return UpdateRecord(**vars(record), metrics=[result.metrics for result in results], scores=scores)


@pytest.fixture(scope="module")
def run_alone(judge):
    """Return a function that gives the record of rollouts one by one, made once for a model."""
    made: dict[str, UpdateRecord] = {}

    def run(**sections):
        key = str(sections["model"])
        if key not in made:
            made[key] = judge.run(1, {}, case=update_alone, **sections)
        return made[key]

    return run


@pytest.mark.parametrize("layout", LAYOUTS)
def test_updates_in_packed_rows_equal_rollouts_alone(judge, run_alone, layout):
    world, parallel, model = LAYOUTS[layout]
    sections = {"model": model, "train": {"seq_len": 40, "micro_batch_size": 2}}
    alone = run_alone(**sections)
    rows = judge.run(world, parallel, case=update_in_rows, **sections)
    assert_equal_runs(rows, alone)
    for name, found, expected in zip(METHODS, rows.metrics, alone.metrics, strict=True):
        for figure, value in found.items():
            assert value == pytest.approx(expected[figure], rel=TOLERANCE, abs=TOLERANCE), (name, figure)
    clipped = {name: one["actor/clip_frac"] for name, one in zip(METHODS, alone.metrics, strict=True)}
    assert all((0.02 < share < 0.9) == (name != "on_policy") for name, share in clipped.items()), clipped
    for found, expected in zip(rows.scores, alone.scores, strict=True):
        for rollout in make_rollouts():
            drawn = rollout.trained()
            np.testing.assert_allclose(found[rollout.key][drawn], expected[rollout.key][drawn], rtol=0, atol=1e-4)


def open_with_reference(engine: Any, config: Config) -> tuple[Any, Any, Any]:
    """Return a stage that keeps policy and reference, the reference, and a function that scores by either."""
    from types import SimpleNamespace

    from trainer.engine.build import POLICY
    from trainer.rl.objective import PolicyObjective
    from trainer.rl.reference import ReferenceWeights, open_reference
    from trainer.rl.update import PolicyUpdates

    reference = open_reference(engine, "grpo.kl.coefficient", "0")
    assert isinstance(reference, ReferenceWeights)
    stage: Any = SimpleNamespace(
        name="grpo", parts={POLICY: engine, "reference": reference}, state_dict=dict, load_state_dict=lambda state: None
    )
    grpo = grpo_config(config, {"algorithm": "dapo"})
    objective = PolicyObjective(
        grpo.grpo.method, temperature=TEMPERATURE, max_new_tokens=MAX_NEW_TOKENS, cp_group=engine.mesh.cp_group
    )
    updates = PolicyUpdates(grpo, engine, objective)
    rollouts = make_rollouts()
    (minibatch,) = updates.cut(rollouts)

    def score(by: Any = None) -> Any:
        return updates.score([minibatch], by)

    def update() -> None:
        columns = {"advantages": updates.advantages(rollouts)}
        assert engine.train_step(updates.with_columns(minibatch, columns), objective, RATE).is_applied

    return stage, reference, SimpleNamespace(score=score, update=update)


def begin_adapter(engine: Any) -> None:
    """Put weights that change what the model says into an adapter, where there is one, as `lora.init_from` does."""
    if engine.adapter is not None:
        for index in range(len(engine.chunks)):
            for module, matrix in engine.adapter.matrices(index).values():
                getattr(module, matrix).data.add_(0.05)
        engine.optimizer.reload_model_params()


def save_with_reference(place: Place, config: Config, run_dir: str, folder: str) -> tuple[Any, Any]:
    """Save a policy after an update with the reference it began from; return what both say."""
    from pathlib import Path

    from tests.small_runs import save_checkpoint
    from trainer.checkpoint.layout import resolve_checkpoint
    from trainer.checkpoint.load import warm_start
    from trainer.engine.state import TrainState

    with open_engine(place, grpo_config(config, {})) as engine:
        warm_start(engine, resolve_checkpoint(run_dir))
        begin_adapter(engine)
        stage, reference, policy = open_with_reference(engine, config)
        reference.remember()
        begun = policy.score()
        policy.update()
        scores = policy.score(), policy.score(reference)
        assert all(np.array_equal(own, scores[1][key]) for key, own in begun.items()), "not what the run starts from"
        save_checkpoint(engine, TrainState(step=1), stage, Path(folder))
        return scores


def load_with_reference(place: Place, config: Config, run_dir: str, folder: str) -> tuple[Any, Any]:
    """Load policy and reference; return what both say, the policy also after another update."""
    from trainer.checkpoint.layout import resolve_checkpoint
    from trainer.checkpoint.load import resume, warm_start

    with open_engine(place, grpo_config(config, {})) as engine:
        warm_start(engine, resolve_checkpoint(run_dir))  # what is under an adapter
        stage, reference, policy = open_with_reference(engine, config)
        assert not reference.is_known
        resume(engine.config, engine.mesh, stage, resolve_checkpoint(folder))
        assert reference.is_known
        scores = policy.score(), policy.score(reference)
        policy.update()
        assert all(np.array_equal(own, scores[1][key]) for key, own in policy.score(reference).items())
        return scores


@pytest.mark.parametrize(
    ("layout", "lora"), [("tp2", None), ("dp2", None), ("tp2", {"rank": 4, "init_from": "its own"})]
)
def test_a_reference_goes_through_a_checkpoint_to_another_layout(ranks, judge, tmp_path, layout, lora):
    from tests.small_runs import small_config

    sections: Any = {
        "train": {"seq_len": 40, "micro_batch_size": 2},
        **({} if lora is None else {"lora": lora, "checkpoint": {"init_from": "seed"}}),
    }
    seed, config = judge.seed({}), small_config(2, parallel={}, **sections)
    saved = ranks.run(save_with_reference, config, str(seed), str(tmp_path), world=2)[0]
    moved = small_config(2, parallel=LAYOUTS[layout][1], **sections)
    loaded = ranks.run(load_with_reference, moved, str(seed), str(tmp_path), world=2)[0]
    largest = 0.0
    for before, after in zip(saved, loaded, strict=True):
        for key, own in before.items():
            np.testing.assert_allclose(after[key], own, rtol=0, atol=10 * TOLERANCE if layout == "tp2" else 0)
            largest = max(largest, float(np.abs(saved[0][key] - saved[1][key]).max()))
    assert largest > 0.01, "policy and reference must differ for this to tell them apart"
