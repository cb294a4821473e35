"""Rules of reward models, and what a scalar head is in the plan."""

from __future__ import annotations

from typing import Any

import pytest

from configs.plan.adapters import count_adapter_parameters
from configs.plan.derive import derive_layout
from configs.plan.estimate import count_parameters, estimate_memory, estimate_stages, parameters_per_rank
from configs.plan.flops import flops_per_step
from configs.rules.check import check_config
from configs.stages import PreferenceConfig, RewardModelConfig

MODEL = {
    "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4, "vocab_size": 320,
    "vocab_pad_multiple": 64,
}  # fmt: skip


def config_of(kind: Any = RewardModelConfig, **sections: Any) -> Any:
    """Return a config that breaks no rule; the sections given change or add fields."""
    fields: dict[str, dict[str, Any]] = {
        "model": MODEL,
        "train": {"num_steps": 5, "seq_len": 64, "global_batch_size": 4},
        "data": {"tokenizer": "tokenizer"},
        "checkpoint": {"init_from": "runs/sft"},
        "precision": {"compute": "fp32"},
        kind.section: {"train": [{"path": "pairs.jsonl"}]},
    }
    for name, section in sections.items():
        fields[name] = fields.get(name, {}) | section
    return kind.model_validate(fields)


def problems_of(config: Any) -> list[str]:
    return check_config(config, 1, platform="cpu", has_te=False)


def test_a_plain_reward_model_breaks_no_rule():
    assert problems_of(config_of()) == problems_of(config_of(lora={"rank": 8})) == []


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"lora": {"target_modules": ["q_proj", "score"]}}, "lora.target_modules: score: no linear of this model's"),
        ({"sample": {"prompts": ["a"]}}, "sample.prompts: has no effect in a reward model"),
        ({"checkpoint": {"init_from": None}}, "checkpoint.init_from: a reward model starts from a trained model"),
        ({"reward": {"train": []}}, "reward.train: 5 steps need at least one source"),
        ({"data": {"packing": "best_fit"}}, "data.packing: has no effect in learning from comparisons"),
    ],
)
def test_what_has_no_effect_or_cannot_be_is_refused(sections, words):
    assert any(problem.startswith(words) for problem in problems_of(config_of(**sections))), words


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_scalar_head_takes_the_place_of_the_output_layer_in_the_plan(is_tied):
    """32 weights instead of 320 * 32, no logits, and as many FLOPs less."""
    model = MODEL | {"tie_embeddings": is_tied}
    scalar, plain = config_of(model=model), config_of(PreferenceConfig, model=model)
    counts = [count_parameters(one.model, one.head).total for one in (scalar, plain)]
    assert counts[0] - counts[1] == 32 - (0 if is_tied else 320 * 32)
    memory = [estimate_memory(one, derive_layout(one, 1)) for one in (scalar, plain)]
    assert memory[0].weights - memory[1].weights == 4 * (counts[0] - counts[1])
    assert memory[0].logits < memory[1].logits / 10
    tokens = 4 * 64
    assert flops_per_step(plain, 4) - flops_per_step(scalar, 4) == 6 * tokens * 32 * (320 - 1)


def test_beside_adapters_the_head_is_trained_in_the_plan():
    """32 weights more than the adapters, on the last stage; PEFT's own count of such a Llama."""
    sections: dict[str, Any] = {"lora": {"rank": 8}, "parallel": {"pp": 2}}
    scalar, plain = (config_of(kind, **sections) for kind in (RewardModelConfig, PreferenceConfig))
    layout = derive_layout(scalar, 2)
    adapters = count_adapter_parameters(plain.model, plain.lora)
    assert count_adapter_parameters(scalar.model, scalar.lora, scalar.head) == adapters + 32
    assert parameters_per_rank(scalar, layout) == parameters_per_rank(plain, layout) + 32
    for one, other in zip(estimate_stages(scalar, layout), estimate_stages(plain, layout), strict=True):
        head = 32 * one.pp_rank
        assert (one.gradients, one.optimizer) == (other.gradients + 4 * head, other.optimizer + 8 * head)
        assert one.weights == other.weights + 4 * (head - 320 * head)
    tokens = 4 * 64
    assert flops_per_step(plain, 4) - flops_per_step(scalar, 4) == 2 * tokens * 32 * (2 * 320 - 3)
    llama = {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 112, "num_query_groups": 2}
    small = config_of(model=MODEL | llama, lora={"rank": 4})
    assert count_adapter_parameters(small.model, small.lora, small.head) == 15_680
