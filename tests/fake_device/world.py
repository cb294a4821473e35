"""Steps of every stage on the fake device: what the host reads meanwhile, and the memory they take.

A process of its own, started by the test with the fake runtime in front of CUDA's (`parallel.platform.fake`). Reads
cases and prints outcomes as JSON.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import traceback
import types
from typing import Any

import torch

from configs.stages import Config
from parallel.platform.fake.tensors import READS
from trainer.rehearse.rank import fake_world, prepare

NUM_STEPS = 2  # the first makes what later ones find
DOCUMENTS = (0, 5, 64, 100, 128)
STAGES = ("policy", "sft", "preference", "distill", "reward", "critic")


def reinforce(engine: Any, batches: list[Any]) -> None:
    """Take a step of reinforcement learning with all that its objective has; the columns are made up."""
    from configs.sections.grpo import GrpoSection
    from trainer.rl.objective import ADVANTAGES, OLD, REFERENCE, SAMPLED, PolicyObjective

    method = GrpoSection(algorithm="grpo", entropy_bonus=0.01, importance_cap=2.0).method
    columns = {name: torch.ones(batches[0].tokens.shape) for name in (ADVANTAGES, OLD, REFERENCE, SAMPLED, "share")}
    columns["ends"] = torch.ones(batches[0].tokens.shape, dtype=torch.int32)
    laid = [dataclasses.replace(one, columns=columns) for one in batches]
    objective = PolicyObjective(method, temperature=0.7, max_new_tokens=8, cp_group=engine.mesh.cp_group)
    engine.train_step(laid, objective, 1e-3)


def fine_tune(engine: Any, batches: list[Any]) -> None:
    """Take a step of fine-tuning with all that its objective has; the weights are made up, tensors here are fake."""
    from configs.sections.sft import SftSection
    from trainer.stages.sft import ConversationEvaluation, ConversationObjective

    sft = SftSection(weighting="sample", neftune_alpha=5.0, label_smoothing=0.1)
    columns = {name: torch.ones(batches[0].tokens.shape) for name in ("weights", "lengths")}
    columns["ends"] = torch.ones(batches[0].tokens.shape, dtype=torch.int32)
    weighed = [dataclasses.replace(one, columns=columns) for one in batches]
    engine.train_step(weighed, ConversationObjective(sft), 1e-3)
    reads = dict(READS)
    engine.sum_losses(weighed, ConversationEvaluation(sft))
    READS.clear()
    READS.update(reads)


def prefer(engine: Any, batches: list[Any]) -> None:
    """Take a step by pairs of answers and one by single ones; what is known of the answers is made up."""
    from configs.sections.preference import PreferenceSection
    from trainer.rl.reference_scores import ReferenceScores
    from trainer.stages.preference import PreferenceObjective

    shape = batches[0].tokens.shape
    columns = {"sequence": torch.zeros(shape, dtype=torch.int64), "ends": torch.ones(shape, dtype=torch.int32)}
    known = {"num_tokens": torch.full((4,), 9.0), "reference": torch.zeros(4), "divergence": torch.zeros(1)}
    sections = PreferenceSection(loss="dpo", sft_weight=0.2), PreferenceSection(loss="kto")
    for method in (section.method for section in sections):
        known["side"] = torch.tensor([1, 2, 1, 2] if method.loss == "dpo" else [1, 3, 2, 3])
        laid = [dataclasses.replace(one, columns=columns, sequences=dict(known)) for one in batches]
        objective = PreferenceObjective(method, ReferenceScores(engine.mesh), engine.mesh.cp_group)
        engine.train_step(laid, objective, 1e-3)


def learn_values(config: Config, mesh: Any, batches: list[Any]) -> dict[str, dict[str, int]]:
    """Take steps of a reward model beside the policy, then one of a critic; return what the host reads in the last."""
    from trainer.engine.build import ModelPlan, build_models
    from trainer.engine.forward import forward_values
    from trainer.rl.critic import RETURNS, VALUES, ValueObjective
    from trainer.stages.reward import RewardObjective

    model: Any = build_models({"reward": ModelPlan(config, is_trained=True, head="scalar")}, mesh)["reward"]
    shape = batches[0].tokens.shape
    columns = {"sequence": torch.zeros(shape, dtype=torch.int64), "ends": torch.ones(shape, dtype=torch.int32)}
    sequences = {"side": torch.tensor([1, 2, 1, 2]), "margin": torch.zeros(2)}
    laid = [dataclasses.replace(one, columns=columns, sequences=sequences) for one in batches]
    for _ in range(NUM_STEPS):
        READS.clear()
        model.train_step(laid, RewardObjective(0.01, mesh.cp_group), 1e-3)
    found = {"reads_of_reward": dict(READS)}
    model.score(batches, forward_values)
    columns = {name: torch.ones(shape) for name in (VALUES, RETURNS)}
    READS.clear()
    model.train_step([dataclasses.replace(one, columns=columns) for one in batches], ValueObjective(0.2), 1e-3)
    model.close()
    return found | {"reads_of_critic": dict(READS)}


def distil(engine: Any, batches: list[Any]) -> None:
    """Take steps with the engine itself for a teacher, by its hidden states and by its likeliest ids."""
    from configs.sections.distill import DistillSection
    from configs.sections.sft import SftSection
    from trainer.rl.teacher import LiveTeacher
    from trainer.stages.distill import DistillObjective

    for top_k in (None, 8):
        section = DistillSection(beta=0.5, label_weight=0.2, top_k=top_k)
        config: Any = types.SimpleNamespace(sft=SftSection(), distill=section)
        teacher = LiveTeacher(engine, temperature=2.0, top_k=top_k)
        taught = teacher.annotate(engine, batches)
        READS.clear()
        engine.train_step(taught, DistillObjective(config, teacher), 1e-3)


def generate(engine: Any) -> dict[str, int]:
    """Draw three tokens for each of four rows, of which three fit, and return what the host reads meanwhile.

    Not with experts, of which nothing can be known here: who gets which token, and what other ranks have left to do.
    """
    from trainer.generate.generator import EngineGenerator
    from trainer.generate.sampling import Sampling

    if engine.config.model.moe is not None:
        return {}
    READS.clear()
    sampling = Sampling(3, temperature=0.7, top_k=20, top_p=0.9, num_samples=2)
    EngineGenerator(engine, max_rows=3).generate([[1, 2, 3], [4] * 60], sampling)
    return dict(READS)


def take_turns(engine: Any, batches: list[Any], objective: Any) -> None:
    """Update a critic and score with a reward model, which lend each other the device's memory."""
    from configs.roles import CRITIC, REWARD
    from trainer.engine.build import ModelPlan, build_models
    from trainer.engine.forward import forward_values

    parallel = engine.config.parallel.model_copy(update={"offload_models": True})
    config = engine.config.model_copy(update={"parallel": parallel})
    plans = {CRITIC: ModelPlan(config, True), REWARD: ModelPlan(config, False, head="scalar")}
    models: Any = build_models(plans, engine.mesh)
    for _ in range(NUM_STEPS):
        models[REWARD].score(batches, forward_values)
        models[CRITIC].train_step(batches, objective, 1e-3)
    assert models[CRITIC]._weights.is_away and models[CRITIC]._update_memory.is_away and models[REWARD]._weights.is_away
    for model in models.values():
        model.close()


def run_the_rest(engine: Any, batches: list[Any], objective: Any) -> dict[str, Any]:
    """Take steps of other objectives, an evaluation, scores, logits and answers; return what the host reads in some."""
    from trainer.engine.forward import forward_language_model, score_language_model

    READS.clear()
    reinforce(engine, batches)
    found = {"reads_of_policy": dict(READS)}
    READS.clear()
    fine_tune(engine, batches)
    found["reads_of_sft"] = dict(READS)
    READS.clear()
    prefer(engine, batches)
    found["reads_of_preference"] = dict(READS)
    engine.sum_losses(batches, objective)
    engine.score(batches, forward_language_model)
    engine.score(batches, functools.partial(score_language_model, entropy=True, is_greedy=True))
    engine.compute_logits(batches[0].tokens)
    return found | {"reads_of_generation": generate(engine)}


def run_case(config: Config, world: int, rank: int, *, is_whole: bool, has_reward: bool) -> dict[str, Any]:
    """Build the engine of one rank and take steps, with `is_whole` all else too; return what the last steps showed.

    With `has_reward` it learns from a teacher, and a reward model and a critic take steps beside it.
    """
    from parallel.replaced_names import resolve
    from tools.device_checks.engine import made_up_batches
    from trainer.data.batch import Documents
    from trainer.engine import kernels
    from trainer.engine.build import build_engine
    from trainer.stages.next_token import NextTokenObjective

    objective = NextTokenObjective()
    with fake_world(config, world, rank) as (mesh, memory):
        engine = build_engine(config, mesh)
        batches = made_up_batches(config)[:: mesh.dp_size]
        if config.data.document_mask:
            bounds = torch.tensor(DOCUMENTS, dtype=torch.int32)
            documents = Documents(tuple(DOCUMENTS), bounds, 59)
            batches = [dataclasses.replace(one, documents=documents) for one in batches]
        for _ in range(NUM_STEPS):
            READS.clear()
            memory.start()
            engine.train_step(batches, objective, 1e-3)
        found = {"reads": dict(READS), "peak_bytes": memory.peak}
        if is_whole:
            found |= run_the_rest(engine, batches, objective)
        if has_reward:
            distil(engine, batches)
            found["reads_of_distill"] = dict(READS)
            if mesh.tp_size > 1:  # once is enough
                take_turns(engine, batches, objective)
            found |= learn_values(config, mesh, batches)
        assert all(resolve(one.target)[2] is one.replacement for one in kernels.replace_kernels(mesh.platform))
        engine.close()
    return found


def main() -> None:
    """Run the cases and print what became of them."""
    prepare()
    results = {}
    for name, case in json.load(sys.stdin).items():
        try:
            sizes = (case["world"], case["rank"])
            flags = {"is_whole": case["is_whole"], "has_reward": case["has_reward"]}
            found = run_case(Config.model_validate(case["config"]), *sizes, **flags)
            results[name] = {"error": None, **found}
        except Exception as failure:
            places = [f"{one.filename}:{one.lineno}" for one in traceback.extract_tb(failure.__traceback__)]
            error = f"{type(failure).__name__}: {failure} at {' < '.join(reversed(places))}"
            nothing: dict[str, dict[str, int]] = {
                kind: {} for kind in ("reads", *(f"reads_of_{stage}" for stage in STAGES), "reads_of_generation")
            }
            results[name] = {"error": error, **nothing, "peak_bytes": 0}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
