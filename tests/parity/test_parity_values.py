"""A scalar head on any layout: values, updates and what is saved are one rank's, and those of `transformers`' score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.errors import BadInput
from configs.stages import Config, HeadKind
from tests.parity.conftest import assert_equal_runs
from tests.parity.test_parity_transformers import as_llama
from tests.pool import Place
from tests.small_runs import MadeUpReader, RunRecord, open_engine, save_checkpoint, train_steps

MOE = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 64, "num_dense_layers": 1, "balancing": "none"}
TIED = {"tie_embeddings": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "tp2": (2, {"tp": 2}, TIED),
    "tp2_sp": (2, {"tp": 2, "sp": True}, {}),
    "pp2_vpp2": (2, {"pp": 2, "vpp": 2}, {}),
    "pp2_tied": (2, {"pp": 2}, TIED),
    "cp2": (2, {"cp": 2}, {}),
    "dp2": (2, {}, {}),
    "tp2_sp_ep2": (2, {"tp": 2, "sp": True, "ep": 2, "etp": 1}, {"moe": MOE}),
}


class ScalarConfig(Config):
    """A run of a model with a scalar head."""

    @property
    def head(self) -> HeadKind:
        """One value a token."""
        return "scalar"


class ValueObjective:
    """Squared distance of the values from the labels, scaled."""

    mean_names = ()

    def forward(self, model: Any, batch: Any) -> Any:
        """Return the values."""
        from trainer.engine.forward import forward_values

        return forward_values(model, batch)

    def loss(self, output: Any, batch: Any) -> Any:
        """Return the sum over counted tokens."""
        from trainer.losses.loss import Loss

        return Loss((batch.loss_mask * (output - batch.labels / 100) ** 2).sum(), {})

    def count(self, batch: Any) -> Any:
        """Return the number of counted tokens."""
        import torch

        return batch.loss_mask.sum(dtype=torch.int32)


def open_scalar(place: Place, config: Config) -> Any:
    """Return the context of an engine with a scalar head."""
    return open_engine(place, ScalarConfig.model_validate(config.model_dump()))


def value_stage(engine: Any) -> Any:
    """Return a stage that learns values."""
    from trainer.evaluate.validation import Evaluator
    from trainer.stages.training import TrainingStage

    reader: Any = MadeUpReader(engine.config, engine.mesh.dp_rank, engine.mesh.dp_size, "uneven")
    return TrainingStage("values", engine, reader, ValueObjective(), Evaluator({}))


def values_of(engine: Any) -> np.ndarray:
    """Return the values `[2, 16]` of a fixed text on every rank. Collective: all ranks of the world must call this."""
    import torch

    from parallel.collectives import from_last_pp_stage
    from trainer.data.batch import Batch
    from trainer.engine.forward import forward_values

    engine.finish_parameter_gather()
    text = torch.from_numpy(np.random.default_rng(11).integers(0, 250, (2, 16)))
    positions = torch.arange(16).expand(2, -1).contiguous()
    batch = Batch(text, text, positions, torch.ones(text.shape), sample_ids=(0, 1))
    found = engine.score([batch] * engine.mesh.pp_size, forward_values)
    values = found[0] if found else torch.empty(text.shape)
    assert values.dtype == torch.float32
    return from_last_pp_stage(values, engine.mesh).numpy()


def learn_values(place: Place, config: Config, run_dir: str, masks: str) -> RunRecord:
    """Begin with a language model's weights, take steps, save, and go on from what was saved."""
    from trainer.checkpoint.layout import resolve_checkpoint
    from trainer.checkpoint.load import warm_start
    from trainer.engine.state import TrainState

    with open_scalar(place, config) as engine:
        warm_start(engine, resolve_checkpoint(run_dir))
        _, results = train_steps(value_stage(engine), TrainState(), 3)
        values = values_of(engine)
    return RunRecord([r.loss for r in results], [r.grad_norm for r in results], [r.num_tokens for r in results], values)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_their_updates_are_one_ranks(judge, layout):
    world, parallel, model = LAYOUTS[layout]
    sections: dict[str, Any] = {"model": model, "train": {"num_steps": 3}}
    alone = judge.run(1, {}, case=learn_values, **sections)
    assert np.ptp(alone.losses) > 0.01
    assert_equal_runs(judge.run(world, parallel, case=learn_values, **sections), alone)


def save_values(place: Place, config: Config, run_dir: str, target: str) -> np.ndarray:
    """Take two steps from a language model's weights, save, and return the values."""
    from trainer.checkpoint.layout import resolve_checkpoint
    from trainer.checkpoint.load import warm_start
    from trainer.engine.state import TrainState

    with open_scalar(place, config) as engine:
        warm_start(engine, resolve_checkpoint(run_dir))
        stage = value_stage(engine)
        state, _ = train_steps(stage, TrainState(), 2)
        save_checkpoint(engine, state, stage, Path(target))
        return values_of(engine)


def load_values(place: Place, config: Config, run_dir: str, is_trained: bool) -> np.ndarray:
    """Return the values of a checkpoint in a model that is trained, or in a frozen one."""
    from parallel.mesh import build_mesh, init_world
    from parallel.platform import load_platform
    from trainer.checkpoint.layout import resolve_checkpoint
    from trainer.checkpoint.load import warm_start
    from trainer.engine.build import ModelPlan, build_models

    platform = load_platform("cpu")
    device = platform.activate(0)
    init_world(platform, config, rank=place.rank, world_size=place.world_size, init_method=place.init_method)
    mesh = build_mesh(platform, device, config)
    model = build_models({"reward": ModelPlan(config, is_trained=is_trained, head="scalar")}, mesh)["reward"]
    try:
        warm_start(model, resolve_checkpoint(run_dir))
        return values_of(model)
    finally:
        model.close()


def test_a_saved_head_is_what_a_frozen_model_takes_on_another_layout(judge, ranks, tmp_path):
    from tests.small_runs import small_config

    seed = judge.seed({})
    config = small_config(2, parallel={"pp": 2})
    saved = ranks.run(save_values, config, str(seed), str(tmp_path), world=2)[0]
    split = small_config(2, parallel={"tp": 2, "sp": True})
    loaded = ranks.run(load_values, split, str(tmp_path), False, world=2)[0]
    np.testing.assert_allclose(loaded, saved, rtol=0, atol=1e-5 * np.abs(saved).max())
    with pytest.raises(Exception, match="holds a language model, which has no scalar head"):
        ranks.run(load_values, small_config(), str(seed), False)


def refuse_as_language_model(place: Place, config: Config, run_dir: str) -> str:
    """Return what is said of a scalar checkpoint in a language model."""
    from trainer.checkpoint.layout import resolve_checkpoint
    from trainer.checkpoint.load import warm_start

    with open_engine(place, config) as engine, pytest.raises(BadInput) as refusal:
        warm_start(engine, resolve_checkpoint(run_dir))
    return str(refusal.value)


def test_a_language_model_takes_no_scalar_checkpoint(judge, ranks, tmp_path):
    from tests.small_runs import small_config

    ranks.run(save_values, small_config(), str(judge.seed({})), str(tmp_path))
    (said,) = ranks.run(refuse_as_language_model, small_config(), str(tmp_path))
    assert "holds a model with a scalar head" in said and "name a checkpoint of a language model" in said


def values_of_llama(place: Place, config: Config) -> tuple[np.ndarray, np.ndarray, float]:
    """Return our values of a text, those of `transformers`' score in float64, and the head's initial deviation."""
    import torch
    from transformers import LlamaForTokenClassification

    from tests.parity.test_parity_transformers import build_llama

    with open_scalar(place, config) as engine:
        named = {name: parameter.data for name, parameter in engine.chunks[0].named_parameters()}
        score = named.pop("output_layer.weight")
        llama = build_llama(config, as_llama(named | {"output_layer.weight": torch.zeros(250, 64)}, config))
        judge = LlamaForTokenClassification(llama.config).double()
        judge.model = llama.model
        judge.score.weight.data, judge.score.bias.data = score.double().expand(2, -1), torch.zeros(2).double()
        judge.eval()
        text = torch.from_numpy(np.random.default_rng(11).integers(0, 250, (2, 16)))
        with torch.no_grad():
            expected = judge(text).logits[..., 0]
        return values_of(engine), expected.numpy(), float(score.std(correction=0))


def test_values_are_those_of_transformers(ranks):
    from tests.small_runs import small_config

    ((found, expected, std),) = ranks.run(values_of_llama, small_config())
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert std == pytest.approx(65**-0.5, rel=0.3)
