"""LoRA: every layout gives one rank's losses, gradient norms, adapters and moments; checkpoints hold these alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.stages import Config
from tests.parity.conftest import TOLERANCE, assert_equal_runs
from tests.pool import Place
from tests.small_runs import (
    RunRecord,
    build_stage,
    open_engine,
    record_run,
    save_checkpoint,
    small_config,
    train_steps,
)

SECTIONS = {
    "lora": {"rank": 4, "alpha": 16},
    "checkpoint": {"async_save": False, "init_from": "the seed"},
    # Adam divides by the gradient's size: with a small eps, rounding in a gradient near zero becomes a full step.
    "optimizer": {"lr": 3e-3, "min_lr": 3e-4, "eps": 1e-2},
}
DENSE: dict[str, Any] = {}
EXPERTS = {"moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 64}, "qk_norm": True}
LATENT: dict[str, Any] = {
    "mla": {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12},
    "num_query_groups": None,
    "rope": {"interleaved": True},
}
SHARED = {"num_dense_layers": 1, "shared_expert_ffn_hidden_size": 32, "score_function": "sigmoid", "balancing": "bias"}
DEEPSEEK = LATENT | {"moe": EXPERTS["moe"] | SHARED}
FULL = {"train": {"recompute": {"granularity": "full"}}}
CASES: dict[str, tuple[dict[str, Any], int, dict[str, Any], dict[str, Any]]] = {
    "tp2": (DENSE, 2, {"tp": 2}, {}),
    "tp2_sp": (DENSE, 2, {"tp": 2, "sp": True}, {}),
    "tp4_more_than_groups": (DENSE, 4, {"tp": 4}, {}),
    "pp2_recomputed": (DENSE, 2, {"pp": 2}, FULL),
    "pp2_vpp2": (DENSE, 2, {"pp": 2, "vpp": 2}, {}),
    "cp2": (DENSE, 2, {"cp": 2}, {}),
    "dp2": (DENSE, 2, {}, {}),
    "experts_ep2": (EXPERTS, 2, {"ep": 2}, {}),
    "experts_ep2_tp2_sp": (EXPERTS, 4, {"ep": 2, "tp": 2, "sp": True}, {}),
    "experts_ep2_tp2_sp_etp1": (EXPERTS, 4, {"ep": 2, "tp": 2, "sp": True, "etp": 1}, {}),
    "latent_tp2": (LATENT, 2, {"tp": 2}, {}),
    "deepseek_ep2_tp2_sp": (DEEPSEEK, 4, {"ep": 2, "tp": 2, "sp": True}, {}),
}  # fmt: skip


def train_adapter(place: Place, config: Config, seed: str, run_dir: str) -> RunRecord:
    """Train the adapters of the seed's weights for 3 steps and save them."""
    from trainer.checkpoint.layout import resolve_checkpoint
    from trainer.checkpoint.load import warm_start
    from trainer.engine.state import TrainState

    with open_engine(place, config) as engine:
        warm_start(engine, resolve_checkpoint(seed))
        stage = build_stage(engine, "uneven")
        state, results = train_steps(stage, TrainState(), 3)
        save_checkpoint(engine, state, stage, Path(run_dir))
        return record_run(engine, results)


def read_saved(run_dir: Path) -> dict[str, np.ndarray]:
    """Return every tensor of the run's checkpoint, whole."""
    from trainer.checkpoint.layout import resolve_checkpoint
    from trainer.checkpoint.tensors import CheckpointTensors

    stored = CheckpointTensors(resolve_checkpoint(run_dir))
    names = {key for key in stored.keys if ".experts.experts." not in key}
    for key in stored.keys - names:
        names |= {key.replace(".experts.experts.", f".experts.experts.{expert}.") for expert in range(4)}
    return {name: stored.read(name).numpy() for name in names}


@pytest.fixture(scope="module")
def references(ranks, judge, tmp_path_factory):
    """The single rank's record and checkpoint by model, made when first asked for."""
    made: dict[str, tuple[RunRecord, dict[str, np.ndarray]]] = {}

    def reference(model: dict[str, Any]) -> tuple[RunRecord, dict[str, np.ndarray]]:
        if str(model) not in made:
            run_dir = tmp_path_factory.mktemp("one")
            config = small_config(model=model_of(model), **SECTIONS)
            (record,) = ranks.run(train_adapter, config, str(judge.seed(model_of(model))), str(run_dir))
            assert np.ptp(record.losses) > 0.01
            made[str(model)] = (record, read_saved(run_dir))
        return made[str(model)]

    return reference


def model_of(model: dict[str, Any]) -> dict[str, Any]:
    from tests.small_runs import DENSE_MODEL

    return DENSE_MODEL | model


@pytest.mark.parametrize("name", CASES)
def test_adapters_on_layouts_equal_one_rank(ranks, judge, references, tmp_path, name):
    model, world, parallel, sections = CASES[name]
    expected, tensors = references(model)
    config = small_config(
        world, model=model_of(model), parallel=parallel | {"timeout_seconds": 60}, **SECTIONS, **sections
    )
    seed = str(judge.seed(model_of(model)))
    records = ranks.run(train_adapter, config, seed, str(tmp_path), world=world)
    for record in records:
        assert_equal_runs(record, expected)
    found = read_saved(tmp_path)
    assert found.keys() == tensors.keys() and len(found) > 20
    assert all("lora." in key for key in found), "the frozen weights are not saved"
    for key, tensor in sorted(tensors.items()):
        atol = 10 * TOLERANCE * np.abs(tensor).max()
        np.testing.assert_allclose(found[key], tensor, rtol=0, atol=atol, err_msg=key)
