"""Several models in one process: the policy is what it is alone, and a second trained one resumes as exactly."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from configs.stages import Config
from tests.parity.conftest import assert_equal_runs
from tests.pool import Place
from tests.small_runs import build_stage, open_mesh, record_run, save_checkpoint, small_config

STOP = 2
LAYOUTS = {
    "one": (1, {}),
    "dp2": (2, {}),
    "tp2_sp": (2, {"tp": 2, "sp": True}),
    "tp2_pp2": (4, {"tp": 2, "pp": 2}),
    "pp2_vpp2": (2, {"pp": 2, "vpp": 2}),
}
OVERLAPPED = {"parallel": {"overlap_grad_reduce": True, "overlap_param_gather": True}}
POLICY_MODEL = {"hidden_dropout": 0.1}
CRITIC_MODEL = {
    "num_layers": 8, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 4, "hidden_dropout": 0.0,
    "tie_embeddings": True,
    "moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 32, "balancing": "aux_loss"},
}  # fmt: skip
CRITIC_RATE = 1e-2


def make_configs(
    name: str, *, policy: dict[str, Any] | None = None, further: Any = None, offload_models: bool = False
) -> tuple[int, Config, Config]:
    """Return the number of ranks, the policy's config, and that of a critic of another shape and optimizer."""
    world, axes = LAYOUTS[name]
    sections = {"train": {"num_steps": 4}, **(further or {})}
    # With tp experts want the sequence split.
    sections["parallel"] = {**axes, "sp": "tp" in axes, **sections.get("parallel", {})}
    config = small_config(world, model=policy or {}, **sections)
    optimizer = {"lr": CRITIC_RATE, "min_lr": 1e-3, "eps": 1e-6, "clip_grad": 0.05}
    critic = small_config(world, model=CRITIC_MODEL, optimizer=optimizer, **sections)
    parallel = config.parallel.model_copy(update={"offload_models": offload_models})
    return world, *(one.model_copy(update={"parallel": parallel}) for one in (config, critic))


@contextlib.contextmanager
def open_models(place: Place, config: Config, critic: Config | None, teacher: Config | None = None) -> Any:
    """Yield the models by role."""
    from configs.roles import CRITIC, POLICY, TEACHER
    from trainer.engine import build
    from trainer.engine.build import ModelPlan

    with open_mesh(place, config) as mesh:
        plans = {POLICY: ModelPlan(config, is_trained=True)}
        if teacher is not None:
            plans[TEACHER] = ModelPlan(teacher, is_trained=False)
        if critic is not None:
            plans[CRITIC] = ModelPlan(critic, is_trained=True)
        with build.open_models(plans, mesh) as models:
            yield models


class TwoStages:
    """A stage that trains its models in turn, each on its own data."""

    name = "pretrain"

    def __init__(self, models: Any) -> None:
        from trainer.engine.sharded_state import RandomGenerators

        self.stages = {
            role: build_stage(model, "uneven") for role, model in models.items() if hasattr(model, "optimizer")
        }
        self.parts = {role: models[role] for role in self.stages} | {"rng": RandomGenerators(models["policy"].mesh)}

    def step(self, state: Any) -> dict[str, Any]:
        return {role: stage.step(state) for role, stage in self.stages.items()}

    def state_dict(self) -> Any:
        return {role: stage.state_dict() for role, stage in self.stages.items()}

    def load_state_dict(self, state: Any) -> None:
        for role, stage in self.stages.items():
            stage.load_state_dict(state[role])


def train(stage: TwoStages, models: Any, state: Any, num_steps: int) -> tuple[Any, dict[str, Any]]:
    """Return the state after so many steps, and a record of each model."""
    results: dict[str, list[Any]] = {role: [] for role in stage.stages}
    for _ in range(num_steps):
        for role, result in stage.step(state).items():
            results[role].append(result)
        state = state.after(results["policy"][-1])
    return state, {role: record_run(models[role], found) for role, found in results.items()}


def run_all(place: Place, config: Config, critic: Config | None, teacher: Config | None, run_dir: str | None) -> Any:
    """Train, saving at STOP where a run directory is given; return the records of the steps after it."""
    from trainer.engine.state import TrainState

    with open_models(place, config, critic, teacher) as models:
        stage = TwoStages(models)
        state, _ = train(stage, models, TrainState(), STOP)
        if run_dir is not None:
            save_checkpoint(models["policy"], state, stage, Path(run_dir))
        return train(stage, models, state, config.train.num_steps - STOP)[1]


def resume_all(place: Place, config: Config, critic: Config, run_dir: str) -> Any:
    """Train on from the checkpoint."""
    from trainer.checkpoint.layout import resolve_checkpoint
    from trainer.checkpoint.load import resume

    with open_models(place, config, critic) as models:
        stage: Any = TwoStages(models)
        state = resume(config, models["policy"].mesh, stage, resolve_checkpoint(run_dir))
        return train(stage, models, state, config.train.num_steps - STOP)[1]


@pytest.mark.parametrize("name", ["one", "tp2_pp2"])
def test_policy_is_the_same_bit_for_bit_beside_other_models(ranks, name):
    """With dropout, whose random numbers those of other models' weights must not move."""
    world, config, critic = make_configs(name, policy=POLICY_MODEL)
    alone = ranks.run(run_all, config, None, None, None, world=world)[0]
    beside = ranks.run(run_all, config, critic, critic, None, world=world)[0]
    assert beside["policy"].losses == alone["policy"].losses
    assert (beside["policy"].logits == alone["policy"].logits).all()


@pytest.fixture(scope="module")
def stopped(ranks, tmp_path_factory):
    """Return a function that gives the run directory and the records of a run stopped on a layout, made once."""
    made = {}

    def get(name):
        if name not in made:
            run_dir = tmp_path_factory.mktemp("stopped")
            world, config, critic = make_configs(name)
            made[name] = str(run_dir), ranks.run(run_all, config, critic, None, str(run_dir), world=world)[0]
        return made[name]

    return get


def test_both_resume_bit_for_bit(ranks, stopped):
    run_dir, uninterrupted = stopped("tp2_sp")
    world, config, critic = make_configs("tp2_sp")
    resumed = ranks.run(resume_all, config, critic, run_dir, world=world)[0]
    for role in ("policy", "critic"):
        assert resumed[role].losses == uninterrupted[role].losses
        assert resumed[role].grad_norms == uninterrupted[role].grad_norms
        assert (resumed[role].logits == uninterrupted[role].logits).all()


@pytest.mark.parametrize(("saved_on", "name"), [("tp2_sp", "dp2"), ("tp2_sp", "pp2_vpp2"), ("tp2_sp", "one")])
def test_both_resume_on_other_layouts(ranks, stopped, saved_on, name):
    run_dir, uninterrupted = stopped(saved_on)
    world, config, critic = make_configs(name)
    resumed = ranks.run(resume_all, config, critic, run_dir, world=world)[0]
    for role in ("policy", "critic"):
        assert_equal_runs(resumed[role], uninterrupted[role])


def resident_bytes(model: Any) -> int:
    """Return the bytes of the device that a model holds."""
    from trainer.engine.turns import distinct_storages

    tensors = [*model._tensors()]
    if model.is_trained:
        tensors += [buffer.grad_data for one in model.modules for buffer in one.buffers + one.expert_parallel_buffers]
        for part in model.optimizer.chained_optimizers:
            for parameter, state in ({} if part.is_stub_optimizer else part.optimizer.state).items():
                tensors += [parameter.data, *state.values()]
    return sum(storage.nbytes() for storage in distinct_storages(tensors).values())


def run_by_turns(place: Place, config: Config, critic: Config, run_dir: str) -> Any:
    """Train with models that rest on the host, and save; return the bytes of the device that they hold."""
    from trainer.engine.state import TrainState

    with open_models(place, config, critic, critic) as models:
        stage: Any = TwoStages(models)
        state, _ = train(stage, models, TrainState(), STOP)
        save_checkpoint(models["policy"], state, stage, Path(run_dir))
        at_rest = {role: resident_bytes(model) for role, model in models.items()}
        with models["critic"].on_device(for_updates=True), models["teacher"].on_device():
            in_turn = {role: resident_bytes(models[role]) for role in ("critic", "teacher")}
            assert in_turn == {role: models[role].num_bytes for role in in_turn}
            return at_rest, in_turn


@pytest.mark.parametrize(("name", "further"), [("tp2_pp2", {"precision": {"compute": "bf16"}}), ("dp2", OVERLAPPED)])
def test_numbers_are_the_same_by_turns(ranks, tmp_path, name, further):
    """Also where the gather of updated weights overlaps the next forward pass, and with main weights beside bf16."""
    world, config, critic = make_configs(name, further=further)
    stays = ranks.run(run_all, config, critic, critic, None, world=world)[0]
    _, config, critic = make_configs(name, further=further, offload_models=True)
    at_rest, in_turn = ranks.run(run_by_turns, config, critic, str(tmp_path), world=world)[0]
    turns = ranks.run(resume_all, config, critic, str(tmp_path), world=world)[0]
    for role in ("policy", "critic"):
        assert turns[role].losses == stays[role].losses
        assert turns[role].grad_norms == stays[role].grad_norms
        assert (turns[role].logits == stays[role].logits).all()
    assert at_rest["critic"] == at_rest["teacher"] == 0
    assert in_turn["critic"] > 2 * in_turn["teacher"] > 0
