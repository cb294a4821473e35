"""Reward models on any layout: updates on packed pairs are those of the written-out loss, pair by pair; heads saved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.errors import BadInput
from configs.stages import Config, RewardModelConfig
from tests.parity.conftest import TOLERANCE, assert_equal_runs
from tests.parity.test_parity_packing import RandomDocuments
from tests.parity.test_parity_preference import PACKED, RATE, PreferenceRecord, open_warm, read_pairs
from tests.parity.test_parity_transformers import as_llama, build_llama
from tests.pool import Place
from tests.small_runs import SEQ_LEN, open_engine, save_checkpoint, small_config, train_steps

# Tokens of chosen and rejected; the first pair fills a row, and the others lie two in a row or alone.
PAIRS = [
    (20, 12), (16, 15), (9, 20), (18, 9), (15, 10), (13, 11), (19, 3), (12, 4), (9, 5), (5, 4), (4, 4), (3, 3), (2, 3),
]  # fmt: skip
CENTERING = 0.05
MOE = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 64, "num_dense_layers": 1, "balancing": "none"}
TIED = {"tie_embeddings": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one": (1, {}, {}),
    "tp2_tied": (2, {"tp": 2}, TIED),
    "tp2_sp": (2, {"tp": 2, "sp": True}, {}),
    "pp2_vpp2": (2, {"pp": 2, "vpp": 2}, {}),
    "pp2_tied": (2, {"pp": 2}, TIED),
    "cp2": (2, {"cp": 2}, {}),
    "dp2": (2, {}, {}),
    "tp2_sp_ep2": (2, {"tp": 2, "sp": True, "ep": 2, "etp": 1}, {"moe": MOE}),
}


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


class RandomPairs(RandomDocuments):
    """Answers of random tokens side by side, scored at the end or before it, every other pair with a margin."""

    def __init__(self) -> None:
        super().__init__([length for pair in PAIRS for length in pair])
        self.masks = [np.ones(length, np.uint8) for length in self.lengths]
        for number, mask in enumerate(self.masks):
            mask[: len(mask) // 2] = 0
            mask[len(mask) - number % 2 * (len(mask) > 3) :] = 0

    def read_mask(self, document: int, start: int, length: int) -> np.ndarray:
        """Return which tokens are trained."""
        return self.masks[document][start : start + length]

    def read_margin(self, document: int) -> float:
        """Return the margin of a document's pair."""
        return 0.37 * (document // 2 % 2)


class WrittenOut:
    """The loss of one pair in a batch of two padded rows, as the papers have it."""

    mean_names = ("accuracy", "margin", "mean_reward")

    def forward(self, model: Any, batch: Any) -> Any:
        """Return the values."""
        from trainer.engine.forward import forward_values

        return forward_values(model, batch)

    def count(self, batch: Any) -> Any:
        """Return the one pair."""
        import torch

        return torch.tensor(1, dtype=torch.int32)

    def loss(self, output: Any, batch: Any) -> Any:
        """Return its loss."""
        import torch

        from trainer.losses.loss import Loss, Mean

        chosen, rejected = (output * batch.loss_mask).sum(1)
        value = torch.log(1 + torch.exp(rejected - chosen + batch.sequences["margin"]))
        value = value + CENTERING * (chosen + rejected) ** 2
        figures = ((chosen > rejected).float(), chosen - rejected, (chosen + rejected) / 2)
        count = torch.tensor(1)
        return Loss(value, {n: Mean(one.detach(), count) for n, one in zip(self.mean_names, figures, strict=True)})


def read_alone(data: RandomPairs) -> list[Any]:
    """Return every pair as two rows as long as the longer, plain causal attention over each."""
    import torch

    from trainer.data.batch import Batch

    batches = []
    for first in range(0, data.num_documents, 2):
        longest = int(data.lengths[first : first + 2].max())
        tokens, scored = torch.zeros(2, longest, dtype=torch.int64), torch.zeros(2, longest)
        for row in (0, 1):
            ids, mask = data.documents[first + row], data.masks[first + row]
            tokens[row, : len(ids)] = torch.from_numpy(ids)
            scored[row, max(place for place, trained in enumerate(mask) if trained)] = 1
        positions = torch.arange(longest).expand(2, -1).contiguous()
        margin = torch.tensor(data.read_margin(first))
        batches.append(Batch(tokens, tokens, positions, scored, sequences={"margin": margin}, sample_ids=(0, 1)))
    return batches


def open_scalar(place: Place, config: Config, run_dir: str) -> Any:
    """Return the context of an engine with a scalar head and otherwise a language model's weights."""
    return open_warm(place, RewardModelConfig.model_validate(config.model_dump()), run_dir)


def make_record(engine: Any, results: Sequence[Any]) -> PreferenceRecord:
    """Return the record of updates done, with values in the place of logits. Collective: all ranks of the world."""
    figures = ([r.loss for r in results], [r.grad_norm for r in results], [r.num_tokens for r in results])
    return PreferenceRecord(*figures, values_of(engine), [result.metrics for result in results])


def update_alone(place: Place, config: Config, run_dir: str, masks: str) -> PreferenceRecord:
    """Update by the written-out loss on pairs one by one."""
    with open_scalar(place, config, run_dir) as engine:
        batches = read_alone(RandomPairs())
        return make_record(engine, [engine.train_step(batches, WrittenOut(), RATE) for _ in range(2)])


def build_reward_stage(engine: Any) -> Any:
    """Return the stage on the pairs, packed; all of them are a batch."""
    from trainer.data.packed_source import ScoredPairSource
    from trainer.data.sequences import with_margins
    from trainer.evaluate.validation import Evaluator
    from trainer.stages.reward import RewardObjective, RewardStage

    source = ScoredPairSource(RandomPairs(), SEQ_LEN, seed=1)  # type: ignore[arg-type]
    reader = read_pairs(engine, source, with_margins)
    return RewardStage("reward", engine, reader, RewardObjective(CENTERING, engine.mesh.cp_group), Evaluator({}))


def update_in_rows(place: Place, config: Config, run_dir: str, masks: str) -> PreferenceRecord:
    """Update as the stage does."""
    from trainer.engine.state import TrainState

    with open_scalar(place, config, run_dir) as engine:
        stage = build_reward_stage(engine)
        _, results = train_steps(stage, TrainState(), 2)
        stage.close()
        return make_record(engine, results)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_updates_in_packed_rows_equal_pairs_alone(judge, layout):
    world, parallel, model = LAYOUTS[layout]
    rate = {"lr": RATE, "min_lr": RATE, "eps": 1e-6}
    sections: dict[str, Any] = {"model": model, "train": {"num_steps": 2}, "optimizer": rate}
    alone = judge.run(1, {}, case=update_alone, **sections)
    rows = judge.run(world, parallel, case=update_in_rows, **sections, data=PACKED)
    assert abs(alone.losses[0] - alone.losses[1]) > 0.01
    assert_equal_runs(rows, alone)
    for found, expected in zip(rows.metrics, alone.metrics, strict=True):
        for figure, value in expected.items():
            assert found[figure] == pytest.approx(value, rel=10 * TOLERANCE, abs=10 * TOLERANCE), figure
        assert found["min_reward"] < found["mean_reward"] < found["max_reward"]


def save_values(place: Place, config: Config, run_dir: str, target: str) -> np.ndarray:
    """Take a step from a language model's weights, save, and return the values."""
    from trainer.engine.state import TrainState
    from trainer.evaluate.validation import Evaluator
    from trainer.stages.training import TrainingStage

    with open_scalar(place, config, run_dir) as engine:
        engine.train_step(read_alone(RandomPairs()), WrittenOut(), RATE)
        engine.finish_parameter_gather()
        save_checkpoint(
            engine, TrainState(), TrainingStage("reward", engine, None, WrittenOut(), Evaluator({})), Path(target)
        )
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
    seed = judge.seed({})
    config = small_config(2, parallel={"tp": 2})
    saved = ranks.run(save_values, config, str(seed), str(tmp_path), world=2)[0]
    split = small_config(2, parallel={"pp": 2})
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
    ranks.run(save_values, small_config(), str(judge.seed({})), str(tmp_path))
    (said,) = ranks.run(refuse_as_language_model, small_config(), str(tmp_path))
    assert "holds a model with a scalar head" in said and "name a language model" in said


def values_of_llama(place: Place, config: Config) -> tuple[np.ndarray, np.ndarray, float]:
    """Return our values of a text, those of `transformers`' score in float64, and the head's initial deviation."""
    import torch
    from transformers import LlamaForTokenClassification

    with open_engine(place, RewardModelConfig.model_validate(config.model_dump())) as engine:
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
    ((found, expected, std),) = ranks.run(values_of_llama, small_config())
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert std == pytest.approx(65**-0.5, rel=0.3)
