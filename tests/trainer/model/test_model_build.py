"""Config -> model: what `check_config` accepts can be built, and holds as many parameters as were estimated."""

from __future__ import annotations

import random
from typing import Any

import pytest
from pydantic import ValidationError

from configs.rules.check import check_config
from configs.stages import Config
from tests.pool import Place, RankFailed
from tests.small_runs import build_stage, open_engine, small_config, train_steps

NUM_CONFIGS = 6000


def random_model(dice: random.Random) -> dict[str, Any]:
    """Return the fields of a small model, many of them at odds with each other."""
    maybe = dice.choice
    rope: dict[str, Any] = {"scaling": maybe(["none", "none", "linear", "dynamic", "llama3", "yarn"])}
    rope["interleaved"] = maybe([False, False, True])
    if rope["scaling"] != "none":
        rope["factor"] = 4.0
    if rope["scaling"] in ("dynamic", "llama3", "yarn"):
        rope["original_max_position_embeddings"] = 64
    model: dict[str, Any] = {
        "num_layers": maybe([2, 3, 4]), "hidden_size": 32, "ffn_hidden_size": maybe([48, 64]),
        "num_attention_heads": maybe([2, 4]), "num_query_groups": maybe([None, 1, 2, 3]),
        "head_dim": maybe([None, 8, 12]), "vocab_size": 100, "vocab_pad_multiple": maybe([1, 8, 128]),
        "max_position_embeddings": 128, "rope": rope, "norm": maybe(["rmsnorm", "layernorm"]),
        "activation": maybe(["swiglu", "geglu", "gelu", "squared_relu"]), "tie_embeddings": maybe([False, True]),
        "linear_bias": maybe([False, False, True]), "qkv_bias": maybe([False, True]),
        "qk_norm": maybe([False, True]), "hidden_dropout": maybe([0.0, 0.1]), "attention_dropout": maybe([0.0, 0.1]),
        "window_size": maybe([None, None, 6]), "attention_sinks": maybe([False, False, True]),
    }  # fmt: skip
    if dice.random() < 0.3:
        model |= {"num_query_groups": None, "head_dim": None, "qkv_bias": False, "qk_norm": False}
        model["rope"] = rope | {"interleaved": True}
        model["mla"] = {
            "q_lora_rank": maybe([None, 8]), "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
            "v_head_dim": 8,
        }  # fmt: skip
    if dice.random() < 0.4:
        model["moe"] = random_experts(dice)
    return model


def random_experts(dice: random.Random) -> dict[str, Any]:
    maybe = dice.choice
    groups = maybe([None, None, 2])
    return {
        "num_experts": maybe([2, 4, 6]), "top_k": maybe([1, 2]), "ffn_hidden_size": maybe([16, 24]),
        "num_dense_layers": maybe([0, 1]), "shared_expert_ffn_hidden_size": maybe([None, 16]),
        "score_function": maybe(["softmax", "sigmoid"]), "softmax_before_topk": maybe([False, True]),
        "balancing": maybe(["aux_loss", "bias", "none"]), "z_loss_coeff": maybe([0.0, 0.1]),
        "scaling_factor": maybe([None, 2.0]), "num_groups": groups, "group_top_k": groups and 1,
    } | maybe([{}, {"aux_loss_coeff": 0.05}])  # fmt: skip


def random_configs(num_ranks: tuple[int, ...], seed: int) -> list[tuple[int, Config]]:
    """Return the configs that `check_config` accepts among many random ones, with their world sizes."""
    dice = random.Random(seed)
    accepted = []
    for _ in range(NUM_CONFIGS):
        world, maybe = dice.choice(num_ranks), dice.choice
        granularity = maybe(["none", "none", "selective", "full"])
        recompute: dict[str, Any] = {"granularity": granularity}
        if granularity == "selective":
            recompute["modules"] = dice.sample(["core_attn", "mlp", "moe", "moe_act", "layernorm", "mla_up_proj"], 2)
        if granularity == "full":
            recompute |= {"method": maybe(["uniform", "block"]), "num_layers": maybe([1, 2])}
        fields = {
            "model": random_model(dice),
            "parallel": {
                "tp": maybe([1, 2, 4]), "pp": maybe([1, 2]), "vpp": maybe([1, 1, 2]), "ep": maybe([1, 1, 2]),
                "etp": maybe([None, None, 1]), "sp": maybe([False, True]),
                "num_layers_in_first_pp_stage": maybe([None, None, 1]),
            } if world > 1 else {},
            "train": {
                "num_steps": 1, "seq_len": 16, "global_batch_size": 4, "micro_batch_size": maybe([1, 2]),
                "recompute": recompute,
            },
            "precision": {"compute": maybe(["bf16", "fp16", "fp32"])},
            "data": {"train": [{"path": "made-up"}]},
        }  # fmt: skip
        try:
            config = Config.model_validate(fields)
        except ValidationError:
            continue
        if not check_config(config, world, platform="cpu", has_te=False):
            accepted.append((world, config))
    return accepted


def refused_by_megatron(place: Place, configs: list[tuple[int, Config]]) -> list[str]:
    """Return what Megatron-Core's own validation says against configs that ours accepted."""
    from types import SimpleNamespace

    from parallel.platform import load_platform
    from trainer.model.config import build_transformer_config

    mesh: Any = SimpleNamespace(platform=load_platform("cpu"))
    refused = []
    for world, config in configs:
        try:
            build_transformer_config(config, mesh, use_te=False)
        except Exception as error:
            fields = config.model_dump(exclude_defaults=True)
            refused.append(f"{type(error).__name__}: {error}\n  {world} ranks, {fields}")
    return refused


def test_what_is_accepted_makes_a_transformer_config(ranks):
    configs = random_configs((1, 2, 4, 8), seed=1)
    assert len(configs) > 150
    kinds = [config for _, config in configs if config.model.mla], [config for _, config in configs if config.model.moe]
    assert min(map(len, kinds)) > 10
    (refused,) = ranks.run(refused_by_megatron, configs)
    assert not refused, f"{len(refused)} of {len(configs)}:\n" + "\n".join(refused[:3])


def step_on_one_rank(place: Place, config: Config) -> tuple[bool, float, int]:
    """Build the model, take one step, and return whether it was applied, its loss and the number of parameters."""
    import torch

    from trainer.engine.state import TrainState

    with open_engine(place, config) as engine:
        stage = build_stage(engine)
        plain = stage.reader.read_step
        stage.reader.read_step = lambda: [fold(batch, config.model.vocab_size) for batch in plain()]
        _, (result,) = train_steps(stage, TrainState(), 1)
        num_parameters = sum(parameter.numel() for parameter in engine.chunks[0].parameters())
        assert torch.isfinite(torch.tensor(result.loss))
        return result.is_applied, result.loss, num_parameters


def fold(batch: Any, vocab_size: int) -> Any:
    """Return the batch with its tokens within a smaller vocabulary."""
    from dataclasses import replace

    return replace(batch, tokens=batch.tokens % vocab_size, labels=batch.labels % vocab_size)


def expert_biases(model: Any) -> int:
    """Return the routers' balancing biases, which published counts include and which are no parameters."""
    if model.moe is None or model.moe.balancing != "bias":
        return 0
    return model.moe.num_experts * (model.num_layers - model.moe.num_dense_layers)


@pytest.mark.slow
def test_what_is_accepted_trains(ranks):
    """One step of sixty accepted configs on one rank: each is finite and as large as estimated."""
    from configs.plan.derive import padded_vocab_size
    from configs.plan.estimate import count_parameters

    configs = [config for _, config in random_configs((1,), seed=2)][:60]
    assert len(configs) == 60
    problems = []
    for config in configs:
        model, fields = config.model, config.model_dump(exclude_defaults=True)
        try:
            ((is_applied, _, num_parameters),) = ranks.run(step_on_one_rank, config)
        except RankFailed as failure:
            problems.append(f"{str(failure).strip().splitlines()[-1]}: {fields}")
            continue
        padding = (padded_vocab_size(model) - model.vocab_size) * model.hidden_size * (2 - model.tie_embeddings)
        expected = count_parameters(model).total + padding - expert_biases(model)
        is_applied = is_applied or config.precision.compute == "fp16"  # the first loss scale may be too large
        if not is_applied or num_parameters != expected:
            problems.append(f"applied {is_applied}, {num_parameters} parameters instead of {expected}: {fields}")
    assert not problems, f"{len(problems)} of {len(configs)}:\n" + "\n".join(problems)


def initial_loss(place: Place, config: Config) -> float:
    """Return the loss of the first step."""
    from trainer.engine.state import TrainState

    with open_engine(place, config) as engine:
        return train_steps(build_stage(engine), TrainState(), 1)[1][0].loss


def test_a_fresh_model_is_nearly_indifferent(ranks):
    """With small initial weights the first loss is the log of the real vocabulary, not of the padded one."""
    import math

    model = {"init_std": 0.005, "vocab_pad_multiple": 1024}
    (loss,) = ranks.run(initial_loss, small_config(model=model))
    assert loss == pytest.approx(math.log(250), abs=0.01)


def fusions(place: Place) -> dict[str, tuple[bool, bool]]:
    """Return whether activation and loss are fused on a device that fuses, by activation and number format."""
    from types import SimpleNamespace
    from typing import cast

    from parallel.mesh import Mesh
    from trainer.model.config import build_transformer_config

    mesh = cast(Mesh, SimpleNamespace(platform=SimpleNamespace(fuses_kernels=True)))
    found = {}
    for activation in ("swiglu", "geglu", "gelu", "squared_relu"):
        for compute in ("bf16", "fp16", "fp32"):
            config = small_config(1, model={"activation": activation}, precision={"compute": compute})
            built = build_transformer_config(config, mesh, use_te=False)
            found[f"{activation} {compute}"] = built.bias_activation_fusion, built.cross_entropy_loss_fusion
    return found


def test_only_fusions_that_compute_the_same_are_used(ranks):
    """Megatron-Core's fused gelu is the tanh approximation, and its fused loss has gradients in bf16 alone."""
    (found,) = ranks.run(fusions)
    assert {name for name, (is_fused, _) in found.items() if is_fused} == {"swiglu bf16", "swiglu fp16", "swiglu fp32"}
    assert {name.split()[1] for name, (_, is_fused) in found.items() if is_fused} == {"bf16"}


def seen_by_others(place: Place, config: Config) -> tuple[list[bool], Any, Any]:
    """Return which layers Megatron-Core gives the window, and its own mask for it and that of transformers."""
    from types import SimpleNamespace
    from typing import cast
    from unittest.mock import patch

    import torch
    from megatron.core.transformer.utils import get_sliding_window_causal_mask, is_layer_window_attention
    from transformers.masking_utils import sliding_window_causal_mask_function

    from parallel.mesh import Mesh
    from parallel.platform import load_platform
    from trainer.model.config import build_transformer_config

    mesh = cast(Mesh, SimpleNamespace(platform=load_platform("cpu")))
    made = build_transformer_config(config, mesh, use_te=False)
    fields, ones = (made.window_size, made.window_attn_skip_freq), torch.ones
    with patch("torch.ones", lambda *size, device, **options: ones(*size, **options)):
        megatron = ~get_sliding_window_causal_mask(12, 12, made.window_size)
    place_of = torch.arange(12)
    transformers = sliding_window_causal_mask_function(config.model.window_size)(0, 0, place_of[:, None], place_of)
    windowed = [is_layer_window_attention(*fields, layer) for layer in range(1, config.model.num_layers + 1)]
    return windowed, megatron.tolist(), transformers.tolist()


def test_a_window_counts_the_querys_own_key_as_transformers_does(ranks):
    model = {"window_size": 5, "window_pattern": [True, False, False]}
    ((windowed, *masks),) = ranks.run(seen_by_others, small_config(model=model))
    assert windowed == [True, False, False, True]
    assert masks == [[[query - 5 < key <= query for key in range(12)] for query in range(12)]] * 2
