"""Generation with the cache: as `transformers.generate` greedily, and the same tokens on every layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.parity import test_parity_hf
from tests.parity.test_parity_hf import make_hf_model
from tests.pool import Place
from tests.small_runs import VOCAB_SIZE, open_engine, small_config

PROMPTS = [np.random.default_rng(length).integers(0, VOCAB_SIZE, length).tolist() for length in (3, 17, 9, 40, 1)]
NUM_TOKENS = 24
# "mistral_window" generates beyond its window of 7, "qwen2_yarn" and "dynamic" beyond the original length of 32.
FAMILIES = ["llama", "qwen3", "qwen3_moe", "deepseek_v2", "deepseek_v3", "mistral_window", "qwen2_yarn", "dynamic"]
DYNAMIC = {
    "max_position_embeddings": 32, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
}  # fmt: skip
MOE = {"moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 32}}
LATENT = {
    "num_query_groups": None,
    "rope": {"interleaved": True},
    "mla": {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16},
}
SINKS = {"window_size": 7, "window_pattern": [True, False], "attention_sinks": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "tp2": (2, {"tp": 2}, {}),
    "pp2": (2, {"pp": 2}, {}),
    "pp2_vpp2": (2, {"pp": 2, "vpp": 2}, {}),
    "dp2": (2, {}, {}),
    "cp2_pp2": (4, {"cp": 2, "pp": 2}, {}),
    "tp2_sp_pp2": (4, {"tp": 2, "sp": True, "pp": 2}, {}),
    "ep2": (2, {"ep": 2}, MOE),
    "ep2_tp2_sp": (4, {"ep": 2, "tp": 2, "sp": True}, MOE),
    "latent_tp2": (2, {"tp": 2}, LATENT),
    "sinks_tp2": (2, {"tp": 2}, SINKS),
}


def score(engine: Any, prompt: list[int], ids: list[int]) -> list[float]:
    """Return the log-probabilities of the answer by a forward pass over the whole text."""
    import torch

    logits = engine.compute_logits(torch.tensor([prompt + ids]))[0].log_softmax(dim=-1)
    return [float(logits[len(prompt) - 1 + place, token]) for place, token in enumerate(ids)]


def generate_as(place: Place, config: Any, start: str, is_hf: bool) -> tuple[Any, Any, list[float]]:
    """Return greedy answers, drawn ones, and the largest errors of their log-probabilities against a whole forward."""
    from configs.plan.kv_cache import bytes_of_token
    from trainer.checkpoint.layout import resolve_checkpoint
    from trainer.checkpoint.load import warm_start
    from trainer.generate.generator import EngineGenerator
    from trainer.generate.sampling import Sampling
    from trainer.hf.source import HfModel
    from trainer.hf.warm_start import load_hf_weights

    with open_engine(place, config) as engine:
        if is_hf:
            load_hf_weights(engine, HfModel(start, config.model))
        else:
            warm_start(engine, resolve_checkpoint(start))
        cache_bytes = (3 * 64 + 1) * bytes_of_token(config)  # three rows of the longest prompt and its answer
        generator = EngineGenerator(engine, cache_bytes=cache_bytes)
        greedy = generator.generate(PROMPTS, Sampling(NUM_TOKENS, temperature=0.0))
        # Some tokens end answers early, so that rows leave and others come in. (With seed 5 one draw lies within 1e-9
        # of the next token, which is closer than layouts agree.)
        drawn = generator.generate(PROMPTS, Sampling(NUM_TOKENS, num_samples=3, seed=6, stop_tokens=tuple(range(7))))
        assert {one.num_slots for one in generator.last_report.replicas} == {3}
        assert {one.cache_bytes for one in generator.last_report.replicas} == {cache_bytes}
        answers = [*greedy, *drawn[:: 1 if is_hf else 4]]
        errors = [
            float(np.abs(np.subtract(one.logprobs, score(engine, PROMPTS[one.prompt], one.token_ids))).max())
            for one in answers
        ]
        return greedy, drawn, errors


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_what_transformers_generates(ranks, tmp_path, monkeypatch, family):
    import torch
    import transformers

    from trainer.hf.config_json import load_config_json, read_model

    monkeypatch.setitem(test_parity_hf.CASES, "dynamic", ("Llama", DYNAMIC, (1, {})))
    make_hf_model(tmp_path / "hf", family)
    model = read_model(load_config_json(tmp_path / "hf"), tmp_path / "hf" / "config.json").model_dump()
    config = small_config(model=model)
    ((greedy, drawn, errors),) = ranks.run(generate_as, config, str(tmp_path / "hf"), True)
    judge = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    options = {"max_new_tokens": NUM_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for prompt, answer in zip(PROMPTS, greedy, strict=True):
        with torch.no_grad():
            expected = judge.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
        assert answer.token_ids == expected and answer.finish == "length"
    assert len(drawn) == 3 * len(PROMPTS) and {one.finish for one in drawn} == {"length", "stop_token"}
    if family != "dynamic":  # keys keep the angles they came with, in transformers too
        assert max(errors) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_draws_the_same_tokens(ranks, judge, layout):
    world, parallel, model = LAYOUTS[layout]
    start = str(judge.seed(model))
    (expected,) = ranks.run(generate_as, small_config(model=model), start, False)
    config = small_config(world, model=model, parallel=parallel)
    for greedy, drawn, errors in ranks.run(generate_as, config, start, False, world=world):
        assert tokens_of(greedy) == tokens_of(expected[0])
        assert tokens_of(drawn) == tokens_of(expected[1])
        assert max(errors) < 1e-5


def tokens_of(answers: Any) -> list[Any]:
    return [(one.prompt, one.sample, one.token_ids, one.finish) for one in answers]
