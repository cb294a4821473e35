"""Logits made piece by piece give the losses, scores, gradients and weights of logits made at once."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from configs.stages import Config
from tests.parity.conftest import assert_equal_runs
from tests.pool import Place
from tests.small_runs import MadeUpReader, RunRecord, open_engine, record_run, run_from_seed, small_config


def run_in_pieces(place: Place, config: Config, run_dir: str, masks: str = "all") -> RunRecord:
    """Run with pieces of some ten tokens and require that they were made."""
    with in_pieces(place, config):
        return run_from_seed(place, config, run_dir, masks)


@contextlib.contextmanager
def in_pieces(place: Place, config: Config) -> Iterator[None]:
    """Make logits in pieces of some ten tokens and require that they were made where there are any."""
    from configs.plan import logits

    largest, calls = logits.LARGEST_PIECE_BYTES, []
    logits.LARGEST_PIECE_BYTES = 8192 // config.parallel.tp

    def count(*args: Any) -> int:
        calls.append(num_pieces(*args))
        return calls[-1]

    from trainer.model import output_loss

    num_pieces, output_loss.num_logit_pieces = output_loss.num_logit_pieces, count
    try:
        yield
    finally:
        logits.LARGEST_PIECE_BYTES, output_loss.num_logit_pieces = largest, num_pieces
    last_stage = place.rank >= place.world_size * (config.parallel.pp - 1) // config.parallel.pp
    assert all(number > 3 for number in calls) and bool(calls) == last_stage


LAYOUTS = {
    "one": (1, {}),
    "tp2": (2, {"tp": 2}),
    "tp2_sp": (2, {"tp": 2, "sp": True}),
    "pp2": (2, {"pp": 2}),
    "cp2": (2, {"cp": 2}),
    "cp2_tp2_sp": (4, {"cp": 2, "tp": 2, "sp": True}),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_pieces_equal_the_whole(judge, name, tied):
    judge.check(*LAYOUTS[name], masks="uneven", case=run_in_pieces, model={"tie_embeddings": tied})


def test_pieces_of_documents_equal_the_whole(judge):
    judge.check(1, {}, masks="documents", case=run_in_pieces, data={"document_mask": True})


TEMPERATURE = 0.7


class PolicyObjective:
    """Minus the weighed log-probabilities of the labels, and an entropy bonus, of a policy that samples at 0.7."""

    mean_names: tuple[str, ...] = ()

    def forward(self, model: Any, batch: Any) -> Any:
        from trainer.engine.forward import score_language_model

        return score_language_model(model, batch, temperature=TEMPERATURE, entropy=True)

    def loss(self, output: Any, batch: Any) -> Any:
        from trainer.losses.loss import Loss

        log_probs, entropy, _ = output
        weights = batch.loss_mask * (batch.labels % 7 - 2)
        return Loss((-weights * log_probs - 0.3 * batch.loss_mask * entropy).sum())

    def count(self, batch: Any) -> Any:
        return (batch.loss_mask > 0).sum(dtype=batch.labels.int().dtype)


class StatedObjective(PolicyObjective):
    """The same, written out in float64 from the logits that the model gives without labels. One rank alone."""

    def forward(self, model: Any, batch: Any) -> Any:
        return state_scores(model(batch.tokens, batch.position_ids, None), batch.labels)


def state_scores(logits: Any, labels: Any) -> tuple[Any, Any, Any]:
    """Return log-probabilities and entropies `[batch, seq]` at the temperature, and whether labels come first."""
    every = (logits.double() / TEMPERATURE).log_softmax(-1)
    entropy = -(every.exp() * every).nan_to_num(0.0).sum(-1)
    return every.gather(-1, labels.unsqueeze(-1)).squeeze(-1), entropy, logits.argmax(-1) == labels


def train_policy(place: Place, config: Config, run_dir: str) -> RunRecord:
    """Train from the seed by scores that are made in pieces."""
    with in_pieces(place, config):
        return train(place, config, run_dir, PolicyObjective())


def train_by_definition(place: Place, config: Config, run_dir: str) -> RunRecord:
    """Train from the seed by the objective in float64."""
    return train(place, config, run_dir, StatedObjective())


def train(place: Place, config: Config, run_dir: str, objective: PolicyObjective) -> RunRecord:
    """Take three steps."""
    from trainer.checkpoint.layout import resolve_checkpoint
    from trainer.checkpoint.load import warm_start

    with open_engine(place, config) as engine:
        warm_start(engine, resolve_checkpoint(run_dir))
        reader = MadeUpReader(config, engine.mesh.dp_rank, engine.mesh.dp_size, "uneven")
        results = [engine.train_step(reader.read_step(), objective, 3e-3) for _ in range(3)]
        return record_run(engine, results)


@pytest.fixture(scope="module")
def stated_policy(ranks, judge):
    """The seed of the policy runs, and the run of the objective in float64."""
    seed = str(judge.seed({}))
    (record,) = ranks.run(train_by_definition, small_config(), seed)
    return seed, record


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_policy_learns_from_scores_as_from_their_definition(ranks, stated_policy, name):
    world, parallel = LAYOUTS[name]
    seed, expected = stated_policy
    for record in ranks.run(train_policy, small_config(world, parallel=parallel), seed, world=world):
        assert_equal_runs(record, expected)


def score_rows(place: Place, config: Config, run_dir: str) -> list[Any] | None:
    """Score two rows with half of the labels the model's first choice; return the scores, and what logits say."""
    import torch

    from trainer.checkpoint.layout import resolve_checkpoint
    from trainer.checkpoint.load import warm_start
    from trainer.engine.forward import forward_language_model, score_language_model

    asked = functools.partial(score_language_model, temperature=TEMPERATURE, entropy=True, is_greedy=True)
    with open_engine(place, config) as engine:
        warm_start(engine, resolve_checkpoint(run_dir))
        masks = "documents" if config.data.document_mask else "all"
        batch, *_ = MadeUpReader(config, 0, 1, masks).read_step()
        logits = engine.compute_logits(batch.tokens)
        labels = torch.where(batch.position_ids % 2 == 0, logits.argmax(-1), batch.labels)
        batch = dataclasses.replace(batch, labels=labels)
        scores = engine.score([batch], asked)
        losses = engine.score([batch], forward_language_model)
    if not scores:
        return None
    return [*scores[0], losses[0], *state_scores(logits, labels)]


@pytest.mark.parametrize("name", [*LAYOUTS, "experts"])
def test_scores_of_a_frozen_model_are_those_of_its_logits(ranks, judge, name):
    world, parallel = LAYOUTS.get(name, (1, {}))
    model = {"moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 64}} if name == "experts" else {}
    config = small_config(world, parallel=parallel, model=model)
    parts = ranks.run(score_rows, config, str(judge.seed(model)), world=world)
    parts = [part for part in parts if part is not None]
    assert len(parts) == world // parallel.get("pp", 1)
    for log_probs, entropy, is_greedy, _, *expected in parts:
        np.testing.assert_allclose(log_probs, expected[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(entropy, expected[1], rtol=1e-5, atol=1e-5)
        assert is_greedy.tolist() == expected[2].tolist() and is_greedy.float().mean() > 0.4


def test_scores_of_documents_come_in_the_order_of_the_rows(ranks, judge):
    seed, data = str(judge.seed({})), {"document_mask": True}
    (expected,) = ranks.run(score_rows, small_config(data=data), seed)
    for part in ranks.run(score_rows, small_config(2, data=data, parallel={"cp": 2}), seed, world=2):
        for found, one in zip(part[:4], expected[:4], strict=True):
            assert found.shape == (2, 32)
            np.testing.assert_allclose(found, one, rtol=1e-5, atol=1e-5)
