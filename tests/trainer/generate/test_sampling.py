"""Tokens are drawn from the distribution that the settings describe, and their log-probabilities are of that one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from configs.errors import BadInput
from configs.plan.kv_cache import rows_that_fit, slot_length
from tests.small_runs import small_config
from trainer.generate.rows import deal
from trainer.generate.sampling import Sampling, check_keys, draw_tokens, row_random
from trainer.generate.stops import cut_at_stop, find_stop_string

PROBABILITIES = np.array([0.05, 0.4, 0.2, 0.1, 0.25])
NUM_DRAWS = 20000


def renormalised(weights):
    return np.array(weights) / np.sum(weights)


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, PROBABILITIES),
        ({"temperature": 0.5}, renormalised(PROBABILITIES**2)),
        ({"top_k": 2}, renormalised([0, 0.4, 0, 0, 0.25])),
        ({"top_p": 0.6}, renormalised([0, 0.4, 0, 0, 0.25])),
        ({"top_p": 0.66}, renormalised([0, 0.4, 0.2, 0, 0.25])),
        ({"top_p": 0.01}, np.array([0, 1.0, 0, 0, 0])),
        # the nucleus is of what temperature and top-k leave
        ({"temperature": 2.0, "top_k": 3, "top_p": 0.7}, renormalised([0, 0.4**0.5, 0, 0, 0.25**0.5])),
    ],
)
def test_draws_follow_the_distribution(settings, expected):
    """Chi-square of what is drawn, below the 99.99 % quantile; log-probabilities are the expected ones exactly."""
    sampling = Sampling(1, **settings)
    logits = torch.from_numpy(np.log(PROBABILITIES)).float().add(3.0).expand(NUM_DRAWS, -1)
    uniforms = torch.tensor([row_random(sampling, (prompt,), 0).random() for prompt in range(NUM_DRAWS)])
    tokens, log_probs, full_log_probs = draw_tokens(logits, sampling, uniforms.double())
    counts = np.bincount(tokens.numpy(), minlength=5)
    assert (counts[expected == 0] == 0).all()
    wanted = expected[expected > 0] * NUM_DRAWS
    chi_square = float(((counts[expected > 0] - wanted) ** 2 / wanted).sum())
    assert chi_square < {1: 1e-9, 2: 15.1, 3: 18.4, 5: 23.5}[len(wanted)]
    np.testing.assert_allclose(log_probs.numpy(), np.log(expected[tokens.numpy()]), atol=1e-6)
    whole = renormalised(PROBABILITIES ** (1 / sampling.temperature))
    np.testing.assert_allclose(full_log_probs.numpy(), np.log(whole[tokens.numpy()]), atol=1e-6)
    assert (full_log_probs is log_probs) == (not sampling.leaves_out)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_k": 700}, {"top_p": 0.9}])
def test_a_draw_finds_the_token_in_a_large_vocabulary(settings):
    """As numpy does in fp64 by the distribution function of all ids; the smallest and the largest number too."""
    sampling, generator = Sampling(1, **settings), torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(200, 1000, generator=generator)
    uniforms = torch.rand(200, dtype=torch.float64, generator=generator)
    uniforms[0], uniforms[1] = 0.0, 1 - 2**-53
    scaled = logits.double().numpy() / sampling.temperature
    if sampling.top_k is not None:
        scaled[scaled < np.sort(scaled)[:, -sampling.top_k, None]] = -np.inf
    chances = np.exp(scaled) / np.exp(scaled).sum(axis=1, keepdims=True)
    if sampling.top_p < 1:
        order = np.argsort(-chances)
        before = np.take_along_axis(chances, order, axis=1).cumsum(axis=1)
        kept = np.roll(before, 1, axis=1) < sampling.top_p
        kept[:, 0] = True
        np.put_along_axis(chances, order, np.where(kept, np.take_along_axis(chances, order, axis=1), 0), axis=1)
        chances /= chances.sum(axis=1, keepdims=True)
    function = chances.cumsum(axis=1)
    wanted = uniforms.numpy().clip(max=1 - 1e-12)[:, None] * function[:, -1:]
    expected = (function <= wanted).sum(axis=1)
    tokens, log_probs, _ = draw_tokens(logits, sampling, uniforms)
    assert tokens.tolist() == expected.tolist()
    np.testing.assert_allclose(log_probs, np.log(chances[range(200), expected]), atol=1e-5)


def test_greedy_takes_the_first_of_the_likeliest():
    logits = torch.tensor([[0.0, 2.0, 2.0], [1.0, 0.0, -1.0]])
    tokens, log_probs, full_log_probs = draw_tokens(logits, Sampling(1, temperature=0.0, top_k=1), torch.empty(0))
    assert tokens.tolist() == [1, 0]
    assert log_probs[0].item() == pytest.approx(-math.log(2 + math.exp(-2)), abs=1e-6)
    assert full_log_probs is log_probs


def test_numbers_belong_to_seed_key_and_sample():
    sampling = Sampling(1, seed=3)
    assert row_random(sampling, (5,), 2).random() == row_random(Sampling(9, top_k=4, seed=3), (5,), 2).random()
    drawn = {
        row_random(Sampling(1, seed=seed), key, sample).random()
        for seed in (0, 3)
        for key in ((0, 5), (5, 0))
        for sample in (0, 2)
    }
    assert len(drawn) == 8


@pytest.mark.parametrize(
    "field, value, works",
    [("temperature", -1.0, "1.0"), ("top_p", 0.0, "0.95"), ("top_k", 0, "1"), ("max_new_tokens", 0, "1")],
)
def test_settings_that_mean_nothing_are_refused(field, value, works):
    with pytest.raises(BadInput, match=f"{field}: .*{works}"):
        Sampling(**{"max_new_tokens": 4, field: value})


def test_stop_strings_are_found_across_tokens_and_at_their_last_token_alone():
    pieces = ["a", "b", "EN", "D.", "tail", "é"[:1]]

    def decode(ids):
        return "".join(pieces[one] for one in ids)

    ids = [0, 1] * 40 + [2, 3]
    assert find_stop_string(ids, ("END", "xyz"), decode) == "END"
    assert find_stop_string(ids[:-1], ("END",), decode) is None
    assert find_stop_string([0, 2, 3, 0], (), decode) is None
    assert cut_at_stop("say END. or STOP", ("STOP", "END")) == "say "


@pytest.mark.parametrize(
    "keys, problem",
    [
        ([[1]], "keys: 1 for 2 prompts; give one for each"),
        ([[1, 2], [1]], r"keys: that of prompt 1 is \[1\]; give 2 numbers"),
        ([[1], [2**32]], r"keys: that of prompt 1 is \[4294967296\]; give 1 numbers, .* from 0 to 4294967295"),
        ([[-1], [0]], r"keys: that of prompt 0 is \[-1\]"),
    ],
)
def test_keys_that_could_share_numbers_are_refused(keys, problem):
    with pytest.raises(BadInput, match=problem):
        check_keys(keys, 2)
    check_keys([[1, 0], [0, 1]], 2)


def test_work_is_dealt_once_and_evenly():
    lengths, answers = [10, 1, 1, 30, 5, 5], [1] * 6
    by_rank = [list(deal(lengths, answers, 4, 2, rank)) for rank in range(2)]
    assert sorted(sum(by_rank, [])) == [(prompt, sample) for prompt in range(6) for sample in range(4)]
    assert len({prompt for prompt, _ in by_rank[0]} & {prompt for prompt, _ in by_rank[1]}) == 0
    loads = [sum(lengths[prompt] for prompt in {one for one, _ in mine}) for mine in by_rank]
    assert abs(loads[0] - loads[1]) <= 10
    # answers count too, once for each sample: 4 * 25 + 1 are as much work as all the others
    assert {prompt for prompt, _ in deal(lengths, [0, 25, 0, 3, 2, 4], 4, 2, 0)} == {1}
    # one prompt, several ranks: its answers are shared out
    assert [len(list(deal([7], [1], 6, 4, rank))) for rank in range(4)] == [2, 2, 1, 1]


def test_a_cache_has_the_rows_that_its_bytes_hold():
    config = small_config()  # 4 layers of 2 groups of keys and values of 16 numbers of 4 bytes
    each = 4 * 2 * 2 * 16 * 4
    assert [slot_length(longest) for longest in (1, 64, 65)] == [64, 64, 128]
    assert rows_that_fit(config, (3 * 64 + 1) * each, 64) == 3
    assert rows_that_fit(config, (3 * 64 + 1) * each - 1, 64) == 2
    with pytest.raises(BadInput, match=f"no row of 65 tokens.* takes 0.000123 GiB .* would work: {129 * each}"):
        rows_that_fit(config, 129 * each - 1, 65)
    assert rows_that_fit(config, 129 * each, 65) == 1
