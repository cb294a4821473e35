"""Several models on the device, at once and by turns: the same numbers, and memory that is free between turns."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tools.device_checks.engine import SMALL_MODEL, build_config, build_repeating_stage, made_up_batches, train
from tools.device_checks.outcome import Outcome, judge

if TYPE_CHECKING:
    from parallel.mesh import Mesh
    from trainer.engine.sharded_model import ShardedModel

NUM_STEPS = 3
CRITIC_MODEL = SMALL_MODEL | {"num_layers": 4, "hidden_size": 256}


def check_turns(mesh: Mesh, compute: str) -> Outcome:
    """Train a policy and a critic and score with a frozen model, with all on the device and then by turns."""
    import torch

    at_once, by_turns = (_train_and_score(mesh, compute, is_by_turns=turns) for turns in (False, True))
    name = f"{compute} models by turns"
    problems = []
    if at_once["losses"] != by_turns["losses"]:
        problems.append(f"losses are {by_turns['losses']} by turns and {at_once['losses']} otherwise")
    if not all(torch.equal(one, other) for one, other in zip(at_once["scores"], by_turns["scores"], strict=True)):
        problems.append("the frozen model gives other scores by turns")
    freed = sum(at_once["resting"]) - sum(by_turns["resting"])
    if at_once["resting"] and freed < by_turns["own"]:
        problems.append(f"{freed} bytes became free of the {by_turns['own']} of the models that rest on the host")
    found = f"{len(at_once['losses'])} losses equal, {freed / 2**20:.1f} MiB free between turns"
    return judge(name, problems, found, {"freed_bytes": freed})


def _train_and_score(mesh: Mesh, compute: str, *, is_by_turns: bool) -> dict[str, Any]:
    """Return losses, scores, the bytes of critic and teacher, and those on the device where that is known."""
    from configs.roles import CRITIC, POLICY, TEACHER
    from trainer.engine.engine import Engine
    from trainer.engine.forward import score_language_model

    with _open(mesh, compute, is_by_turns=is_by_turns) as models:
        losses = []
        for role in (POLICY, CRITIC, POLICY):
            engine = models[role]
            assert isinstance(engine, Engine)
            losses += [result.loss for result in train(build_repeating_stage(engine), NUM_STEPS)]
        said = models[TEACHER].score(made_up_batches(models[TEACHER].config), score_language_model)
        scores = [one.log_probs for one in said]
        own = sum(models[role].num_bytes for role in (CRITIC, TEACHER))
        with mesh.platform.measure_peak() as resting:
            mesh.platform.synchronize()
    return {"losses": losses, "scores": scores, "own": own, "resting": resting}


@contextlib.contextmanager
def _open(mesh: Mesh, compute: str, *, is_by_turns: bool) -> Iterator[dict[str, ShardedModel]]:
    """Yield a policy, a larger critic and a frozen teacher."""
    from configs.roles import CRITIC, POLICY, TEACHER
    from trainer.engine.build import ModelPlan, open_models

    parallel = {"offload_models": is_by_turns}
    small = build_config(compute, parallel=parallel)
    large = build_config(compute, CRITIC_MODEL, parallel=parallel, optimizer={"lr": 1e-3, "min_lr": 1e-3})
    plans = {POLICY: ModelPlan(small, True), CRITIC: ModelPlan(large, True), TEACHER: ModelPlan(large, False)}
    with open_models(plans, mesh) as models:
        yield models
    models.clear()
    gc.collect()
