"""LoRA: which modules a model has, what is refused, and what the frozen weights do not cost."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.errors import BadInput
from configs.fp8 import uses_te_layers
from configs.load import load_config
from configs.plan.adapters import count_adapter_parameters, module_names
from configs.plan.derive import derive_layout
from configs.plan.estimate import estimate_memory, parameters_per_rank
from configs.plan.flops import flops_per_step
from configs.rules.check import check_config
from configs.stages import Config

MODELS = Path(__file__).parents[2] / "configs" / "models"
RUN = ["data.train=[{path: a}]", "train.num_steps=10", "train.seq_len=64", "train.global_batch_size=16"]
BASE = "checkpoint.init_from=runs/demo"


def config_of(model: str, *overrides: str) -> Config:
    return load_config(str(MODELS / f"{model}.yaml"), [*RUN, *overrides])


@pytest.mark.parametrize(
    ("overrides", "start"),
    [
        (["lora={rank: 8}"], "checkpoint.init_from: LoRA adapts a trained model, and none is named"),
        (["lora={target_modules: [q_proj, lm_head]}", BASE], "lora.target_modules: lm_head: no linear of this model's"),
        (["lora={target_modules: [kv_b_proj]}", BASE], "lora.target_modules: kv_b_proj: no linear"),
        (["lora={target_modules: []}", BASE], "lora.target_modules: is empty; values that would work: all-linear, or"),
        (["lora={target_modules: [all-linear, q_proj]}", BASE], "lora.target_modules: all-linear names all"),
        (["lora={}", BASE, "precision.fp8={recipe: tensorwise, backend: te}"], "precision.fp8.backend: LoRA's layers"),
    ],
)
def test_what_cannot_be_is_refused(overrides, start):
    problems = check_config(config_of("tiny", *overrides), 1, platform="cuda", has_te=False)
    assert [problem for problem in problems if problem.startswith(start)], problems


@pytest.mark.parametrize("field", ["rank: 0", "alpha: 0", "dropout: 1.0", "dropout: -0.1"])
def test_values_out_of_range_are_refused(field):
    with pytest.raises(BadInput, match=f"lora.{field.split(':')[0]}"):
        config_of("tiny", f"lora={{{field}}}")


def test_what_can_be_passes():
    for words in ("lora={}", "lora={target_modules: all-linear}", "lora={target_modules: [q_proj, gate_proj]}"):
        assert not check_config(config_of("tiny", words, BASE), 1, platform="cpu", has_te=False)
    mixtral = config_of("mixtral_8x7b", "lora={target_modules: [w1, q_proj]}", BASE)
    assert not check_config(mixtral, 1, platform="cpu", has_te=False)


def test_the_modules_are_those_of_hugging_face():
    dense = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert module_names(config_of("llama3_1_8b").model) == dense
    latent = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", *dense[4:])
    assert module_names(config_of("deepseek_v3").model) == latent


def test_adapters_are_counted_as_published():
    """Llama 3.1 8B: PEFT's own count for rank 16, of all linears and of queries and values."""
    every = config_of("llama3_1_8b", "lora={rank: 16}", BASE)
    assert count_adapter_parameters(every.model, every.lora) == 41_943_040
    some = config_of("llama3_1_8b", "lora={rank: 16, target_modules: [q_proj, v_proj]}", BASE)
    assert count_adapter_parameters(some.model, some.lora) == 6_815_744


def test_frozen_weights_cost_no_gradient_and_no_optimizer():
    full, lora = config_of("llama3_1_8b"), config_of("llama3_1_8b", "lora={rank: 16}", BASE)
    layout = derive_layout(lora, 1)
    assert parameters_per_rank(lora, layout) == 41_943_040
    estimate = estimate_memory(lora, layout)
    assert estimate.gradients == 4 * 41_943_040 and estimate.optimizer == 12 * 41_943_040
    assert estimate.weights == estimate_memory(full, layout).weights + 2 * 41_943_040
    split = config_of("llama3_1_8b", "lora={rank: 16}", BASE, "parallel.tp=2")
    rank = 16  # column: A whole, B halved; row: A halved, B whole
    held = 32 * rank * ((3 * 4096 + 6144 // 2) + (4096 // 2 + 4096) + (2 * 4096 + 14336) + (14336 // 2 + 4096))
    assert parameters_per_rank(split, derive_layout(split, 2)) == held


def test_flops_lack_the_gradients_of_frozen_weights():
    """By hand for Llama 3.1 8B: 4 a token and frozen weight, 6 an adapter's, attention as ever."""
    lora = config_of("llama3_1_8b", "lora={rank: 16}", BASE)
    multiplied = 8_030_261_248 - 128256 * 4096 - 65 * 4096
    expected = 64 * 16 * (4 * multiplied + 6 * 41_943_040) + 3 * 32 * 32 * 256 * 64**2 * 16
    assert flops_per_step(lora, 16) == pytest.approx(expected, rel=1e-12)


def test_adapters_run_beside_layers_of_our_own():
    assert uses_te_layers(config_of("tiny"), has_te=True)
    assert not uses_te_layers(config_of("tiny", "lora={}", BASE), has_te=True)
