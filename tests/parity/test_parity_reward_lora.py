"""Reward models with LoRA: every layout trains adapters and head as one rank does; what is saved goes on, and scores.

The judge of values and gradients is `transformers`' sequence classifier with the adapters added to its weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.roles import HeadKind
from configs.stages import Config, RewardModelConfig
from tests.parity.conftest import TOLERANCE, assert_equal_runs
from tests.parity.test_parity_hf import make_hf_model, read_section
from tests.parity.test_parity_lora import read_saved
from tests.parity.test_parity_lora_hf import fill_adapters, put_gradients_in_place, read_adapter, weights_by_module
from tests.parity.test_parity_preference import PACKED, RATE, PreferenceRecord
from tests.parity.test_parity_reward import (
    RandomPairs,
    WrittenOut,
    build_reward_stage,
    make_record,
    read_alone,
    values_of,
)
from tests.pool import Place
from tests.small_runs import open_engine, open_mesh, small_config, train_steps

LORA = {"rank": 4, "alpha": 16}
SECTIONS: dict[str, Any] = {
    "lora": LORA,
    "train": {"num_steps": 3},
    "optimizer": {"lr": RATE, "min_lr": RATE, "eps": 1e-2},
    "data": PACKED,
}
HEAD = "output_layer.weight"
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2_sp": (2, {"tp": 2, "sp": True}),
    "pp2": (2, {"pp": 2}),
    "pp2_vpp2": (2, {"pp": 2, "vpp": 2}),
    "cp2": (2, {"cp": 2}),
    "dp2": (2, {}),
}


def config_of(base: Path, world: int, parallel: dict[str, Any]) -> Config:
    """Return the config of a run whose frozen weights are the base's."""
    checkpoint = {"async_save": False, "init_from": str(base)}
    parallel = parallel | {"timeout_seconds": 60}
    config = small_config(world, **SECTIONS, parallel=parallel, checkpoint=checkpoint)
    return RewardModelConfig.model_validate(config.model_dump())


def train(place: Place, config: Config, run_dir: str, saved: str | None = None) -> PreferenceRecord:
    """Take 3 updates, or those that a checkpoint left, and save after the first and at the end."""
    from trainer.checkpoint.base_weights import identify_base
    from trainer.checkpoint.layout import existing_checkpoint
    from trainer.checkpoint.load import resume
    from trainer.checkpoint.save import CheckpointWriter
    from trainer.engine.state import TrainState
    from trainer.run.weights import load_weights

    base = existing_checkpoint(config.checkpoint.init_from, "base")
    with open_engine(place, config) as engine:
        stage, state = build_reward_stage(engine), TrainState()
        load_weights(engine, str(base))
        if saved is not None:
            state = resume(config, engine.mesh, stage, Path(saved))
        writer = CheckpointWriter(run_dir, config, engine.mesh, base=identify_base(base))
        results = []
        while state.step < 3:
            state, some = train_steps(stage, state, 1)
            results += some
            if state.step != 2:
                writer.save(state, stage)
        writer.finish()
        stage.close()
        return make_record(engine, results)


@pytest.fixture(scope="module")
def one(ranks, judge, tmp_path_factory) -> tuple[PreferenceRecord, Path]:
    """What one rank's run did, and its directory."""
    run_dir = tmp_path_factory.mktemp("one")
    (record,) = ranks.run(train, config_of(judge.seed({}), 1, {}), str(run_dir))
    assert np.ptp(record.losses) > 0.01
    return record, run_dir


@pytest.mark.parametrize("layout", LAYOUTS)
def test_adapters_and_head_on_layouts_equal_one_rank(ranks, judge, one, tmp_path, layout):
    world, parallel = LAYOUTS[layout]
    for record in ranks.run(train, config_of(judge.seed({}), world, parallel), str(tmp_path), world=world):
        assert_equal_runs(record, one[0])
    found, expected = read_saved(tmp_path), read_saved(one[1])
    assert found.keys() == expected.keys()
    assert {key.removeprefix("optimizer.state.exp_avg.") for key in found if HEAD in key} >= {HEAD}
    assert all("lora." in key or key.endswith(HEAD) for key in found), "frozen weights are saved"
    for key, tensor in sorted(expected.items()):
        atol = 10 * TOLERANCE * np.abs(tensor).max()
        np.testing.assert_allclose(found[key], tensor, rtol=0, atol=atol, err_msg=key)


def load_frozen(place: Place, config: Config, run_dir: str, head: HeadKind = "scalar") -> np.ndarray:
    """Return the values of a frozen model with the weights of a run."""
    from trainer.engine.build import ModelPlan, open_models
    from trainer.run.weights import load_weights

    whole = config.model_copy(update={"lora": None})
    with open_mesh(place, config) as mesh:
        plans = {"reward": ModelPlan(whole, is_trained=False, head=head)}
        with open_models(plans, mesh) as models:
            load_weights(models["reward"], run_dir)
            return values_of(models["reward"])


def test_a_run_goes_on_elsewhere_and_frozen_models_take_its_merged_weights_and_head(ranks, judge, one, tmp_path):
    """Beside a language model, and in a run that begins beside the weights of such a run."""
    record, run_dir = one
    saved = str(run_dir / "checkpoints" / "step_00000001")
    moved = ranks.run(train, config_of(judge.seed({}), 2, {"pp": 2}), str(tmp_path / "moved"), saved, world=2)[0]
    np.testing.assert_allclose(moved.losses, record.losses[1:], rtol=TOLERANCE)
    np.testing.assert_allclose(moved.grad_norms, record.grad_norms[1:], rtol=TOLERANCE)
    np.testing.assert_allclose(moved.logits, record.logits, rtol=0, atol=1e-4 * np.abs(record.logits).max())
    split = config_of(judge.seed({}), 2, {"tp": 2})
    values = ranks.run(load_frozen, split, str(run_dir), world=2)[0]
    np.testing.assert_allclose(values, record.logits, rtol=0, atol=1e-5 * np.abs(values).max())
    with pytest.raises(Exception, match="holds a model with a scalar head"):
        ranks.run(load_frozen, split, str(run_dir), "vocabulary", world=2)
    (further,) = ranks.run(train, config_of(run_dir, 1, {}), str(tmp_path / "further"))
    assert further.losses[0] < record.losses[-1] < record.losses[0], "it begins with the head that was trained"
    values = ranks.run(load_frozen, split, str(tmp_path / "further"), world=2)[0]
    np.testing.assert_allclose(values, further.logits, rtol=0, atol=1e-5 * np.abs(values).max())


def update_and_export(place: Place, config: Config, folder: str) -> tuple[float, float, np.ndarray]:
    """Export random adapters with a head, merged too, then their gradients; return loss, gradient norm and values."""
    from trainer.checkpoint.base_weights import identify_base
    from trainer.checkpoint.save import CheckpointWriter
    from trainer.engine.state import TrainState
    from trainer.hf.export_source import describe_source
    from trainer.hf.exporting import export_checkpoint
    from trainer.hf.peft import export_adapter
    from trainer.run.weights import load_weights

    hf = Path(config.checkpoint.init_from_hf or "")

    def export(state: TrainState, name: str) -> None:
        writer = CheckpointWriter(folder, config, engine.mesh, base=identify_base(hf))
        writer.save(state, stage)
        writer.finish()
        source = describe_source(Path(folder) / "checkpoints" / f"step_{state.step:08d}")
        report = export_adapter(source, Path(folder) / name, dtype=None, rank=place.rank)
        assert "num_labels=1" in report.notes[0]
        if name == "adapter":
            ranks = {"rank": place.rank, "world_size": place.world_size}
            export_checkpoint(source, Path(folder) / "merged", dtype=None, on_bytes=lambda done: None, **ranks)

    with open_engine(place, config) as engine:
        load_weights(engine, str(hf))
        fill_adapters(engine)
        stage = build_reward_stage(engine)
        export(TrainState(), "adapter")
        values = values_of(engine)
        state, (result,) = train_steps(stage, TrainState(), 1)
        stage.close()
        put_gradients_in_place(engine)
        export(state, "gradients")
        return result.loss, result.grad_norm, values


def draw_head(place: Place, config: Config) -> np.ndarray:
    """Return the head that a model which is trained whole begins with."""
    with open_engine(place, config.model_copy(update={"lora": None})) as engine:
        return engine.chunks[-1].output_layer.weight.detach().numpy()


def begin_with_peft(place: Place, config: Config, adapter: str) -> np.ndarray:
    """Return the values of a new run that begins with a PEFT directory."""
    from trainer.run.weights import load_peft_adapter, load_weights

    with open_engine(place, config) as engine:
        load_weights(engine, str(config.checkpoint.init_from_hf))
        load_peft_adapter(engine, adapter)
        return values_of(engine)


def test_values_and_gradients_are_those_of_transformers(ranks, tmp_path):
    import torch
    import transformers
    from safetensors.torch import load_file

    make_hf_model(tmp_path / "hf", "llama")
    model = read_section(tmp_path / "hf").model_dump() | {"vocab_pad_multiple": 16}
    checkpoint = {"async_save": False, "init_from_hf": str(tmp_path / "hf")}
    sections = SECTIONS | {"model": model, "checkpoint": checkpoint, "optimizer": {"clip_grad": 0.0}}
    plain = small_config(2, parallel={"tp": 2, "sp": True, "timeout_seconds": 60}, **sections)
    config = RewardModelConfig.model_validate(plain.model_dump())
    loss, norm, values = ranks.run(update_and_export, config, str(tmp_path / "run"), world=2)[0]
    scores = [load_file(tmp_path / "run" / kind / "adapter_model.safetensors") for kind in ("adapter", "gradients")]
    head, head_gradient = (tensors["base_model.model.score.weight"] for tensors in scores)
    whole = ranks.run(draw_head, config, world=2)[0]
    np.testing.assert_array_equal(head, whole)
    other = config.model_copy(update={"run": config.run.model_copy(update={"seed": 5})})
    again = ranks.run(begin_with_peft, other, str(tmp_path / "run" / "adapter"), world=2)[0]
    np.testing.assert_allclose(again, values, rtol=0, atol=1e-6)
    settings = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert settings["task_type"] == "SEQ_CLS" and settings["modules_to_save"] == ["score"]
    auto = transformers.AutoModelForSequenceClassification
    judge = auto.from_pretrained(tmp_path / "hf", dtype=torch.float32, num_labels=1)
    adapters, gradients = (read_adapter(tmp_path / "run" / kind) for kind in ("adapter", "gradients"))
    weights, scaling = weights_by_module(judge, lambda parameter: parameter.data), LORA["alpha"] / LORA["rank"]
    judge.score.weight.data.copy_(head)
    for module, (a, b) in adapters.items():
        weights[module] += scaling * torch.from_numpy(b @ a)
    text = torch.from_numpy(np.random.default_rng(11).integers(0, 250, (2, 16)))
    merged = auto.from_pretrained(tmp_path / "run" / "merged", dtype=torch.float32)
    for one in (judge, merged):
        with torch.no_grad():
            expected = one.score(one.model(text).last_hidden_state)[..., 0].numpy()
        np.testing.assert_allclose(values, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    pairs = read_alone(RandomPairs())
    losses = [WrittenOut().loss(judge.score(judge.model(one.tokens).last_hidden_state)[..., 0], one) for one in pairs]
    mean = torch.stack([one.total for one in losses]).mean()
    mean.backward()
    assert loss == pytest.approx(mean.item(), rel=1e-5)
    grads = weights_by_module(judge, lambda parameter: parameter.grad)
    np.testing.assert_allclose(
        head_gradient, judge.score.weight.grad, rtol=0, atol=1e-5 * float(judge.score.weight.grad.abs().max())
    )
    squares = float(judge.score.weight.grad.square().sum())
    for module, (a, b) in adapters.items():
        whole = grads[module].numpy()
        for found, closed in zip(gradients[module], (scaling * b.T @ whole, scaling * whole @ a.T), strict=True):
            np.testing.assert_allclose(found, closed, rtol=0, atol=1e-5 * np.abs(closed).max(), err_msg=module)
            squares += float(np.square(closed).sum())
    assert norm == pytest.approx(squares**0.5, rel=1e-5), "of adapters and head"
