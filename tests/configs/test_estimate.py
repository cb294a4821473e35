"""Parameters against published counts and transformers' own models, memory and FLOPs against closed formulas."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.load import load_config
from configs.plan.derive import derive_layout, layer_windows
from configs.plan.estimate import count_parameters, estimate_memory, estimate_stages, parameters_per_rank
from configs.plan.flops import attended_pairs, model_flops
from configs.sections.model import ModelConfig
from configs.sections.parallel import ParallelConfig
from configs.sections.train import RecomputeConfig, TrainConfig
from configs.stages import Config

MODELS = Path(__file__).parents[2] / "configs" / "models"

# Safetensors headers of the published checkpoints; DeepSeek-V3 without its multi-token-prediction module, with the
# 58 x 256 `e_score_correction_bias` values of its routers.
PUBLISHED = {
    "tiny": 3_950_848,
    "tiny_half": 2_004_288,  # 4096 x 192 + 3 x (192 x 384 + 192 x 192 + 3 x 192 x 512 + 2 x 192) + 192
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "llama3_1_8b": 8_030_261_248,
    "llama3_1_70b": 70_553_706_496,
    "llama3_1_405b": 405_853_388_800,
    "qwen3_0_6b": 596_049_920,
    "qwen3_8b": 8_190_735_360,
    "qwen3_32b": 32_762_123_264,
    "qwen3_30b_a3b": 30_532_122_624,
    "mixtral_8x7b": 46_702_792_704,
    "deepseek_v3": 671_026_419_200,
    # These two: what transformers' own model has (below), router biases included.
    "kimi_k2": 1_026_408_232_448,
    "moonlight_16b_a3b": 15_960_110_208,
}


def preset(name: str) -> ModelConfig:
    return load_config(str(MODELS / f"{name}.yaml"), ["train.num_steps=0"]).model


def test_every_preset_has_a_published_count() -> None:
    assert sorted(path.stem for path in MODELS.glob("*.yaml")) == sorted(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_equal_the_published_count(name: str) -> None:
    assert count_parameters(preset(name)).total == PUBLISHED[name]


@pytest.mark.parametrize(
    ("name", "active_billions", "non_embedding_billions"),
    [("qwen3_30b_a3b", 3.35, 29.9), ("mixtral_8x7b", 12.88, 46.44), ("deepseek_v3", 37.55, 669.17)],
)
def test_active_and_embedding_parameters(name: str, active_billions: float, non_embedding_billions: float) -> None:
    count = count_parameters(preset(name))
    assert count.active / 1e9 == pytest.approx(active_billions, abs=0.005)
    assert (count.total - count.embedding) / 1e9 == pytest.approx(non_embedding_billions, abs=0.01)


def hf_config(name: str, model: ModelConfig) -> object:
    """Write our fields as transformers' config of the same family."""
    import transformers

    shared = {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups or model.num_attention_heads,
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": model.tie_embeddings,
        "pad_token_id": None,
    }
    if name.startswith("llama"):
        return transformers.LlamaConfig(**shared)
    if name == "mixtral_8x7b":
        return transformers.MixtralConfig(**shared, num_local_experts=model.moe.num_experts)
    if name == "deepseek_v3":
        return transformers.DeepseekV3Config(**shared)  # its defaults are the 671B model
    if model.mla is not None:
        return transformers.DeepseekV3Config(
            **shared,
            **model.mla.model_dump(),
            n_routed_experts=model.moe.num_experts,
            moe_intermediate_size=model.moe.ffn_hidden_size,
            first_k_dense_replace=model.moe.num_dense_layers,
            n_shared_experts=model.moe.shared_expert_ffn_hidden_size // model.moe.ffn_hidden_size,
        )
    if model.moe is not None:
        moe = {"num_experts": model.moe.num_experts, "moe_intermediate_size": model.moe.ffn_hidden_size}
        return transformers.Qwen3MoeConfig(**shared, head_dim=model.head_dim, **moe)
    return transformers.Qwen3Config(**shared, head_dim=model.head_dim)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["llama3_2_1b", "qwen3_0_6b", "qwen3_30b_a3b", "mixtral_8x7b", "deepseek_v3", "kimi_k2", "moonlight_16b_a3b"],
)
def test_parameters_equal_transformers_own_model(name: str) -> None:
    import torch
    import transformers

    model = preset(name)
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(hf_config(name, model))
    count = theirs.num_parameters()
    if model.mla is not None:  # the router bias is a buffer there, and a tensor of the published checkpoint
        count += (model.num_layers - model.moe.num_dense_layers) * model.moe.num_experts
    assert count == count_parameters(model).total


def gpt(**overrides: object) -> Config:
    """A GPT as Korthikanti et al. have it: MHA, GELU of 4 h, dropout, no biases to keep the sums short."""
    fields = {
        "num_layers": 8,
        "hidden_size": 64,
        "ffn_hidden_size": 256,
        "num_attention_heads": 4,
        "vocab_size": 512,
        "activation": "gelu",
        "hidden_dropout": 0.1,
        "tie_embeddings": False,
    }
    train = {"num_steps": 1, "seq_len": 32, "global_batch_size": 64, "micro_batch_size": 2}
    return Config(
        model=ModelConfig(**fields),
        train=TrainConfig(**(train | dict(overrides.pop("train", {})))),
        parallel=ParallelConfig(**overrides),
    )


def activations(config: Config, world_size: int) -> int:
    memory = estimate_memory(config, derive_layout(config, world_size))
    return memory.activations + memory.logits


def outside_layers(tokens: int, hidden: int, vocab: int, tp: int, split: int) -> float:
    """Embedding dropout mask, final norm's and output layer's inputs, fp32 logits (Korthikanti et al., section 4.3).

    And the logits of 16 bits that these are made from, which the paper leaves out.
    """
    return tokens * hidden / split + 4 * tokens * hidden / split + (4 + 2) * tokens * vocab / tp


@pytest.mark.parametrize(("tp", "sp"), [(1, False), (2, False), (4, False), (2, True), (4, True)])
def test_activations_follow_korthikanti(tp: int, sp: bool) -> None:
    tokens, hidden, heads, layers = 2 * 32, 64, 4, 8
    logsumexp = 4 * heads * tokens / tp  # kept by flash attention in place of the paper's 5 a s / h term
    if sp:
        per_layer = tokens * hidden * 34 / tp + logsumexp  # equation 4
    else:
        per_layer = tokens * hidden * (10 + 24 / tp) + logsumexp  # equation 2
    outside = outside_layers(tokens, hidden, 512, tp, tp if sp else 1)
    assert activations(gpt(tp=tp, sp=sp), tp) == round(layers * per_layer + outside)


def test_activations_of_pipelines_follow_korthikanti() -> None:
    tokens, hidden = 64, 64
    per_layer = 34 * tokens * hidden + 4 * 4 * tokens
    mask = tokens * hidden
    gradients = (16 + 2 * 2) * tokens * hidden  # of one layer's MLP, input and output, where no logits are larger
    # 1F1B: the first of 4 stages keeps 4 microbatches of its 2 layers, as many as the whole model's.
    assert activations(gpt(pp=4), 4) == round(8 * per_layer + 4 * mask + gradients)
    # Interleaved: L (1 + (p - 1) / (p m)) layers (section 4.2.3); the embedding's mask is of the first chunk, of which
    # 7 microbatches are kept: 4, then 4 of the second chunk, then 3 more.
    factor = 1 + 3 / (4 * 2)
    assert activations(gpt(pp=4, vpp=2), 4) == round(8 * per_layer * factor + 7 * mask + gradients)


def test_chunks_in_flight_count_one_by_one() -> None:
    """The last of two stages holds chunks of two layers and one: it keeps two microbatches of the first, one of the
    second, as rehearsals of interleaved stages have shown."""
    config = gpt(pp=2, vpp=2, vocabulary_counts_as_layers=True)
    config = config.model_copy(update={"model": config.model.model_copy(update={"num_layers": 6})})
    per_layer = 34 * 64 * 64 + 4 * 4 * 64
    last = estimate_stages(config, derive_layout(config, 2))[-1]
    assert last.activations == (2 * 2 + 1) * per_layer + 4 * 64 * 64
    assert last.logits == (4 + 2) * 64 * 512


def test_recomputation_keeps_layer_inputs_alone() -> None:
    tokens, hidden, layers = 64, 64, 8
    per_layer = 34 * tokens * hidden + 4 * 4 * tokens
    outside, logits = outside_layers(tokens, hidden, 512, 1, 1), (4 + 2) * tokens * 512
    full = RecomputeConfig(granularity="full", num_layers=2)
    # The logits are gone before a group of layers is computed again; beside it are the gradients of one layer's MLP.
    gradients = (16 + 2 * 2) * tokens * hidden
    expected = 4 * 2 * tokens * hidden + outside - logits + max(2 * per_layer + gradients, logits)
    assert activations(gpt(train={"recompute": full}), 1) == expected
    block = RecomputeConfig(granularity="full", method="block", num_layers=3)
    expected = 3 * 2 * tokens * hidden + 5 * per_layer + outside - logits + max(per_layer + gradients, logits)
    assert activations(gpt(train={"recompute": block}), 1) == expected
    mlp = RecomputeConfig(granularity="selective", modules=("mlp",))
    assert activations(gpt(train={"recompute": mlp}), 1) == layers * (per_layer - 16 * tokens * hidden) + outside


def test_rank_parameters_add_up_over_the_ranks() -> None:
    config = gpt()
    total = count_parameters(config.model).total  # the vocabulary of 512 needs no padding
    assert parameters_per_rank(config, derive_layout(config, 1)) == total
    norms = 2 * 64 * 8 + 64
    split = gpt(tp=4, sp=True)
    assert parameters_per_rank(split, derive_layout(split, 4)) == (total - norms) // 4 + norms
    staged = gpt(pp=4)
    assert parameters_per_rank(staged, derive_layout(staged, 4)) == (total - 2 * 512 * 64 - 64) // 4 + 512 * 64 + 64


def test_optimizer_state_is_sharded_and_gradients_are_not() -> None:
    config = gpt()
    one, four = (estimate_memory(config, derive_layout(config, world_size)) for world_size in (1, 4))
    parameters = count_parameters(config.model).total
    assert (one.weights, one.gradients, one.optimizer) == (2 * parameters, 4 * parameters, 12 * parameters)
    assert (four.weights, four.gradients, four.optimizer) == (2 * parameters, 4 * parameters, 3 * parameters)
    in_fp32 = config.model_copy(update={"precision": config.precision.model_copy(update={"compute": "fp32"})})
    memory = estimate_memory(in_fp32, derive_layout(in_fp32, 1))
    assert (memory.weights, memory.optimizer) == (4 * parameters, 8 * parameters)
    assert memory.total == memory.weights + memory.gradients + memory.optimizer + memory.activations + memory.logits


def test_experts_are_split_over_ep_and_sharded_over_edp() -> None:
    overrides = ["train.num_steps=1", "train.global_batch_size=64", "train.seq_len=1024"]
    path = str(MODELS / "mixtral_8x7b.yaml")
    alone = load_config(path, overrides)
    spread = load_config(path, [*overrides, "parallel.ep=8"])
    experts = 32 * 8 * 3 * 4096 * 14336
    whole, eighth = (parameters_per_rank(config, derive_layout(config, 8)) for config in (alone, spread))
    assert whole - eighth == experts - experts // 8
    memory = estimate_memory(spread, derive_layout(spread, 8))
    assert memory.optimizer == 12 * (whole - experts) // 8 + 12 * experts // 8  # edp is 1


def test_flops_of_a_dense_model_follow_the_closed_formula() -> None:
    model = preset("llama3_1_8b")
    multiplied = 8_030_261_248 - 128256 * 4096 - (2 * 32 + 1) * 4096  # neither look-up nor norms
    attention = 32 * 8192 * 4096 * 2  # causal half of 4 s h per layer
    assert model_flops(model, 8192, 32 * 8192**2) == 8192 * 3 * (2 * multiplied + attention)


def test_flops_of_windows_count_the_pairs_that_are_seen() -> None:
    """Against the mask written out; half of a square leaves out half its diagonal, and so does the first window's."""
    seen = [[key <= query and key > query - 7 for key in range(40)] for query in range(40)]
    assert attended_pairs(40, 7) / 2 == sum(map(sum, seen)) - 7 / 2
    assert attended_pairs(5, 7) == attended_pairs(5, None) == 25
    model = preset("llama3_1_8b").model_copy(update={"window_size": 1024, "window_pattern": (True, False, False)})
    windowed = tuple(layer for layer, window in enumerate(layer_windows(model)) if window == 1024)
    assert windowed == tuple(range(0, 32, 3))


def test_flops_of_experts_count_the_active_ones() -> None:
    model = preset("deepseek_v3")
    count = count_parameters(model)
    core = 61 * 4096 * 128 * (128 + 64 + 128)
    rough = 3 * (2 * (count.active - 129280 * 7168) + core)
    assert model_flops(model, 4096, 61 * 4096**2) / 4096 == pytest.approx(rough, rel=1e-4)
