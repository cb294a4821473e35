"""The generator on one rank: what ends answers, what is refused, and that rows do not depend on each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from configs.errors import BadInput
from tests.pool import Place
from tests.small_runs import VOCAB_SIZE, open_engine, small_config

PROMPTS = [np.random.default_rng(length).integers(0, VOCAB_SIZE, length).tolist() for length in (3, 30, 1, 12)]


def decode(ids: Any) -> str:
    """Spell ids as letters: two for each, so that a text may begin inside a token."""
    return "".join(chr(97 + one // 16) + chr(97 + one % 16) for one in ids)


def generate_much(place: Place, config: Any) -> dict[str, Any]:
    """Return answers in several settings, and what is refused."""
    import torch

    from trainer.generate.generator import EngineGenerator
    from trainer.generate.sampling import Sampling

    found: dict[str, Any] = {"refused": []}
    with open_engine(place, config) as engine:
        generator = EngineGenerator(engine, decode, max_rows=3)
        sampling = Sampling(20, num_samples=4, seed=1)
        found["together"] = generator.generate(PROMPTS, sampling)
        found["one at a time"] = EngineGenerator(engine, max_rows=1).generate(PROMPTS, sampling)
        told: list[tuple[int, int, int]] = []
        found["first alone"] = generator.generate(PROMPTS[:1], sampling, lambda *one: told.append(one))
        found["third alone"] = generator.generate(PROMPTS[2:3], sampling, keys=[[2]])
        found["other keys"] = generator.generate(PROMPTS[:1], sampling, keys=[[0, 7]])
        found["report"] = generator.last_report
        found["outlives"] = memory_that_outlives(generator, sampling)
        found["otherwise"] = answers_on_other_paths(engine, sampling)
        found["full errors"] = errors_of_full_logprobs(engine, generator)
        found["told"] = told
        spelled = decode(found["together"][0].token_ids)
        found["stop"] = spelled[5:8]  # from the middle of one token to the middle of another, or inside two
        found["stopped"] = generator.generate(PROMPTS[:1], Sampling(20, seed=1, stop_strings=("?", found["stop"])))[0]
        found["at the end"] = generator.generate([[1] * 120], Sampling(20, temperature=0.0))[0]
        found["foreign"] = generate_with_foreign_attention(engine, generator, sampling)
        found["is_training_unharmed"] = bool(torch.isfinite(engine.compute_logits(torch.tensor([PROMPTS[1]]))).all())
        for prompts, options, one in (
            ([[]], {}, generator),
            ([[1], [1] * 128], {}, generator),
            ([[VOCAB_SIZE]], {}, generator),
            ([[1]], {"stop_strings": ("x",)}, EngineGenerator(engine)),
            ([[1] * 60], {}, EngineGenerator(engine, cache_bytes=1000)),
        ):
            with pytest.raises(BadInput) as refusal:
                one.generate(prompts, Sampling(2, **options))
            found["refused"].append(str(refusal.value))
    return found


def memory_that_outlives(generator: Any, sampling: Any) -> list[int]:
    """Return how many tensors of the cache there were in a call, and how many are left when it has returned."""
    import gc
    import weakref

    from trainer.model.attention.cache import KeyValueCache

    kept: list[Any] = []

    class Watched(KeyValueCache):
        def copy(self, *places: int) -> None:
            kept.extend(weakref.ref(store) for stores in self._layers.values() for store in stores)
            super().copy(*places)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("trainer.generate.generator.KeyValueCache", Watched)
        gc.disable()  # what is let go of at once needs no collector
        generator.generate(PROMPTS, sampling)
        left = sum(one() is not None for one in kept)
        gc.enable()
    return [len(kept), left]


def answers_on_other_paths(engine: Any, sampling: Any) -> dict[str, Any]:
    """Return answers by Megatron-Core's way through a layer alone, and those with packed weights; what was packed."""
    import weakref

    from trainer.generate.generator import EngineGenerator
    from trainer.model import new_tokens, packed_weights

    platform, packed, calls = engine.mesh.platform, [], []
    pack_weight, attend, found = platform.pack_weight, new_tokens._attend, {}

    def pack(weight: Any, num_tokens: int) -> Any:
        multiply = pack_weight(weight, num_tokens) or (lambda inputs: inputs @ weight.t())  # without MKL
        packed.append(weakref.ref(multiply))
        return multiply

    def count(*args: Any) -> Any:
        calls.append(len(args[1]))
        return attend(*args)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(platform), "pack_weight", lambda _, *args: pack(*args))
        patched.setattr(new_tokens, "_attend", count)
        found["packed"] = EngineGenerator(engine, max_rows=16).generate(PROMPTS, sampling)
        found["calls"] = calls
        patched.setattr(new_tokens, "_is_plain", lambda layer: False)
        patched.setattr(type(platform), "pack_weight", lambda *args: None)
        found["megatron"] = EngineGenerator(engine, max_rows=16).generate(PROMPTS, sampling)
    found["weights"] = [len(packed), sum(one() is not None for one in packed), len(packed_weights._products)]
    return found


def errors_of_full_logprobs(engine: Any, generator: Any) -> list[float]:
    """Return how far those of answers to a prompt, drawn with top-k, are from a pass over the whole text."""
    import torch

    from trainer.generate.sampling import Sampling

    drawn = generator.generate(PROMPTS[:1], Sampling(20, temperature=0.7, top_k=5, num_samples=2))
    errors = []
    for one in drawn:
        text = torch.tensor([PROMPTS[0] + one.token_ids])
        whole = (engine.compute_logits(text)[0] / 0.7).log_softmax(dim=-1)[len(PROMPTS[0]) - 1 : -1]
        expected = whole.gather(-1, torch.tensor(one.token_ids)[:, None]).squeeze(-1)
        errors.append(float((expected - torch.tensor(one.full_logprobs)).abs().max()))
        assert all(full < log_prob for full, log_prob in zip(one.full_logprobs, one.logprobs, strict=True))
    return errors


def generate_with_foreign_attention(engine: Any, generator: Any, sampling: Any) -> Any:
    """Generate where layers attend with what knows no cache, and chunks hand no positions down."""
    import torch

    class Foreign(torch.nn.Module):
        pass

    layers = [layer.self_attention for layer in engine.chunks[0].decoder.layers]
    cores = [layer.core_attention for layer in layers]
    hooks = dict(engine.chunks[0]._forward_pre_hooks)
    for layer in layers:
        layer.core_attention = Foreign()
    engine.chunks[0]._forward_pre_hooks.clear()
    engine.chunks[0].config.apply_rope_fusion = True
    answers = generator.generate(PROMPTS, sampling)
    assert all(isinstance(layer.core_attention, Foreign) for layer in layers)
    assert engine.chunks[0].config.apply_rope_fusion and not engine.chunks[0]._forward_pre_hooks
    engine.chunks[0]._forward_pre_hooks.update(hooks)
    engine.chunks[0].config.apply_rope_fusion = False
    for layer, core in zip(layers, cores, strict=True):
        layer.core_attention = core
    return answers


@pytest.fixture(scope="module")
def found(ranks):
    return ranks.run(generate_much, small_config())[0]


def ids(answers: Any) -> list[list[int]]:
    return [one.token_ids for one in answers]


def test_an_answer_depends_on_no_other(found):
    """Whatever rows are beside it, and wherever it stands among the slots."""
    assert [(one.prompt, one.sample) for one in found["together"]] == [(p, s) for p in range(4) for s in range(4)]
    assert ids(found["together"]) == ids(found["one at a time"])
    assert ids(found["first alone"]) == ids(found["together"])[:4]
    assert len({tuple(one) for one in ids(found["together"])}) == 16
    assert ids(found["third alone"]) == ids(found["together"])[8:12]
    assert len({tuple(one) for one in ids(found["other keys"] + found["first alone"])}) == 8
    by_row = {sample: [token for _, other, token in found["told"] if other == sample] for sample in range(4)}
    assert list(by_row.values()) == ids(found["first alone"])


def test_a_stop_string_ends_an_answer_at_the_token_that_completes_it(found):
    stopped, whole = found["stopped"], found["together"][0]
    assert stopped.finish == "stop_string" and len(stopped.logprobs) == len(stopped.token_ids) == 4
    assert stopped.token_ids == whole.token_ids[:4]
    assert found["stop"] in decode(stopped.token_ids) and found["stop"] not in decode(stopped.token_ids[:-1])


def test_the_context_is_a_limit(found):
    assert found["at the end"].finish == "length" and len(found["at the end"].token_ids) == 8


def test_layers_that_know_no_cache_borrow_our_attention(found):
    assert ids(found["foreign"]) == ids(found["together"])
    assert found["is_training_unharmed"]


def test_what_a_model_cannot_take_is_refused(found):
    assert found["refused"] == [
        "prompt 0: 0 tokens; with model.max_position_embeddings=128 a prompt has 1 to 127",
        "prompt 1: 128 tokens; with model.max_position_embeddings=128 a prompt has 1 to 127",
        f"prompt 0: token {VOCAB_SIZE} is not one of the model's, 0 to {VOCAB_SIZE - 1}",
        "stop_strings: need a tokenizer to be found with; give stop_tokens, or a tokenizer",
        "cache_bytes: 1000 hold no row of 62 tokens, prompt and answer, which takes 6.2e-05 GiB on a rank; a value "
        "that would work: 66560",
    ]


def test_log_probabilities_of_all_ids_are_those_of_a_whole_pass(found):
    assert max(found["full errors"]) < 1e-5
    assert all(one.full_logprobs == one.logprobs for one in found["together"])


def test_the_cache_is_freed_when_the_call_returns(found):
    there, left = found["outlives"]
    assert there > 0 and left == 0


def test_new_tokens_take_the_same_way_as_all_others_in_fewer_steps(found):
    """Passes of new tokens by themselves, and products with packed weights, are those of Megatron-Core's layers."""
    otherwise = found["otherwise"]
    assert otherwise["calls"] == [16] * 4 * 19  # rows, in each layer of every pass but the prompts'
    # four linears a layer and the output layer, packed once, freed with the call
    assert otherwise["weights"] == [4 * 4 + 1, 0, 0]
    for ours, theirs in zip(otherwise["packed"], otherwise["megatron"], strict=True):
        assert ours.token_ids == theirs.token_ids
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=2e-6)


def test_a_report_counts_what_the_call_took(found):
    (one,) = found["report"].replicas
    assert (one.replica, one.num_slots) == (0, 3)
    assert (one.num_prompt_tokens, one.num_tokens) == (2 * len(PROMPTS[0]), 4 * 20)  # the fourth answer came later
    assert one.seconds > 0 and found["report"].idle_shares == (0.0,)


def generate_unevenly(place: Place, config: Any) -> Any:
    """Return what two replicas report where one prompt's answers are expected to be as long as all others' together."""
    from trainer.generate.generator import EngineGenerator
    from trainer.generate.sampling import Sampling

    with open_engine(place, config) as engine:
        generator = EngineGenerator(engine)
        answers = generator.generate(PROMPTS, Sampling(48, temperature=0.0), expected_lengths=[100, 0, 0, 0])
        with pytest.raises(BadInput, match="expected_lengths: 1 for 4 prompts; give one for each"):
            generator.generate(PROMPTS, Sampling(20), expected_lengths=[1])
        return generator.last_report, [one.prompt for one in answers]


def test_replicas_share_work_by_expected_lengths_and_report_it(ranks):
    found = ranks.run(generate_unevenly, small_config(2), world=2)
    assert found[0] == found[1]
    report, order = found[0]
    assert order == [0, 1, 2, 3]
    assert [one.replica for one in report.replicas] == [0, 1]
    others = sum(len(prompt) for prompt in PROMPTS[1:])
    assert [one.num_prompt_tokens for one in report.replicas] == [len(PROMPTS[0]), others]
    assert [one.num_tokens for one in report.replicas] == [48, 3 * 48] and report.num_tokens == 4 * 48
    assert min(report.idle_shares) == 0.0 and report.seconds == max(one.seconds for one in report.replicas)
