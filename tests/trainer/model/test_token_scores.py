"""Scores of labels and their gradients, with the vocabulary on one rank or two, against their definition in float64."""

from __future__ import annotations

from typing import Any

import pytest

from tests.pool import Place

SEQ, ROWS, VOCAB, REAL = 5, 3, 24, 21


def make_case(dtype: str) -> tuple[Any, Any, Any, Any]:
    """Return logits `[seq, rows, vocab]`, the last ids none, labels `[rows, seq]`, and weights of two scores."""
    import torch

    torch.manual_seed(3)
    logits = (torch.randn(SEQ, ROWS, VOCAB) * 6).to(getattr(torch, dtype))
    logits[..., REAL:] = torch.finfo(logits.dtype).min
    logits[0, 0, :REAL] = 0.0  # the lowest id of all
    logits[1, 0, 4] = logits[1, 0, 17] = 40.0  # two first choices, on two ranks
    logits[2, 0, :REAL] = -1e4
    logits[2, 0, 9] = 1e4  # one id has all
    labels = torch.randint(0, REAL, (ROWS, SEQ))
    labels[0, :3] = torch.tensor([0, 17, 9])
    labels[1] = logits[:, 1].argmax(-1)
    labels[2, 0] = REAL - 1
    return logits, labels, torch.randn(ROWS, SEQ), torch.randn(ROWS, SEQ)


def define(logits: Any, labels: Any, temperature: float) -> list[Any]:
    """Return log-probabilities, entropies and greedy hits `[rows, seq]` of the ids that there are."""
    import torch

    logits = logits[..., :REAL].transpose(0, 1)
    log_probs = (logits / temperature).log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    firsts = [[min(i for i, x in enumerate(row) if x == max(row)) for row in rows] for rows in logits.tolist()]
    return [log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1), entropy, torch.tensor(firsts) == labels]


def score_on_ranks(place: Place, dtype: str, temperature: float, asked: tuple[bool, bool]) -> list[Any]:
    """Return the scores and this rank's part of the gradient of their weighed sum."""
    import torch.distributed as dist

    from trainer.model.token_scores import Scoring, score_logits

    dist.init_process_group("gloo", init_method=place.init_method, rank=place.rank, world_size=place.world_size)
    logits, labels, *weights = make_case(dtype)
    mine = logits.chunk(place.world_size, dim=-1)[place.rank].clone().requires_grad_()
    scores = score_logits(mine * 1, labels, Scoring(temperature, *asked), dist.group.WORLD, is_compiled=False)
    total = (scores.log_probs * weights[0]).sum()
    if scores.entropy is not None:
        total = total + (scores.entropy * weights[1]).sum()
    total.backward()
    return [*(one if one is None else one.detach() for one in scores), mine.grad]


@pytest.mark.parametrize("asked", [(True, True), (False, False)], ids=["all", "log_probs"])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
@pytest.mark.parametrize("world", [1, 2])
def test_scores_are_their_definition(ranks, world, temperature, asked):
    import torch

    parts = ranks.run(score_on_ranks, "float32", temperature, asked, world=world)
    logits, labels, *weights = make_case("float32")
    exact = logits.double().requires_grad_()
    log_probs, entropy, is_greedy = define(exact, labels, temperature)
    (log_probs * weights[0] + (entropy * weights[1] if asked[0] else 0)).sum().backward()
    for found in parts:
        for one, expected in zip(found[:2], (log_probs, entropy if asked[0] else None), strict=True):
            assert (one is None) == (expected is None)
            if one is not None:
                assert one.dtype == torch.float32
                torch.testing.assert_close(one.double(), expected.detach(), rtol=3e-6, atol=3e-6)
        assert torch.equal(found[2], is_greedy) if asked[1] else found[2] is None
    gradient = torch.cat([found[3] for found in parts], dim=-1)
    assert not gradient[..., REAL:].any(), "ids that are none have a gradient"
    torch.testing.assert_close(gradient.double(), exact.grad, rtol=3e-6, atol=3e-6)
    assert is_greedy.any() and not is_greedy.all()


def test_logits_in_16_bits_are_scored_in_fp32(ranks):
    import torch

    (found,) = ranks.run(score_on_ranks, "bfloat16", 0.6, (True, True))
    logits, labels, *weights = make_case("bfloat16")
    exact = logits.double().requires_grad_()
    log_probs, entropy, is_greedy = define(exact, labels, 0.6)
    (log_probs * weights[0] + entropy * weights[1]).sum().backward()
    torch.testing.assert_close(found[0].double(), log_probs.detach(), rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(found[1].double(), entropy.detach(), rtol=3e-6, atol=3e-6)
    assert torch.equal(found[2], is_greedy) and found[3].dtype == torch.bfloat16
    torch.testing.assert_close(found[3].double(), exact.grad, rtol=2**-8, atol=1e-6)


def largest_differences(place: Place) -> list[float]:
    """Return how far the compiled passes are from the others: scores, then the gradient."""
    import torch.distributed as dist

    from trainer.model.token_scores import Scoring, score_logits

    dist.init_process_group("gloo", init_method=place.init_method, rank=place.rank, world_size=place.world_size)
    logits, labels, *weights = make_case("float32")
    found = []
    for is_compiled in (False, True):
        mine = logits.clone().requires_grad_()
        scores = score_logits(mine, labels, Scoring(0.6, entropy=True), dist.group.WORLD, is_compiled=is_compiled)
        ((scores.log_probs * weights[0]) + (scores.entropy * weights[1])).sum().backward()
        found.append([scores.log_probs.detach(), scores.entropy.detach(), mine.grad])
    return [float((one - other).abs().max()) for one, other in zip(*found, strict=True)]


@pytest.mark.slow
def test_compiled_passes_are_the_passes(ranks):
    """The compiler once gathered from logits that it had already written over."""
    (differences,) = ranks.run(largest_differences, timeout=300)
    assert max(differences) < 1e-4, differences  # of log-probabilities down to -3e4


def compare_with_losses(place: Place) -> list[bool]:
    """Return whether log-probabilities at a temperature of 1 are, bit for bit, minus Megatron-Core's losses."""
    import torch
    import torch.distributed as dist
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from trainer.model.token_scores import Scoring, score_logits

    dist.init_process_group("gloo", init_method=place.init_method, rank=place.rank, world_size=place.world_size)
    logits, labels, *_ = make_case("float32")
    mine = logits.chunk(place.world_size, dim=-1)[place.rank]
    losses = vocab_parallel_cross_entropy(mine.clone(), labels.t().contiguous(), tp_group=dist.group.WORLD)
    scores = score_logits(mine.clone(), labels, Scoring(entropy=True), dist.group.WORLD, is_compiled=False)
    return [torch.equal(scores.log_probs, -losses.t())]


@pytest.mark.parametrize("world", [1, 2])
def test_at_a_temperature_of_one_they_are_minus_the_losses(ranks, world):
    assert ranks.run(compare_with_losses, world=world) == [[True]] * world
