"""The code of GPUs where there is none: whole steps on fake tensors, what the host reads, and the memory they take."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tools.device_checks.engine import SMALL_MODEL, build_config

HERE = Path(__file__).resolve().parent
MOE = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 96}
LATENT = {"q_lora_rank": 64, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}
LATENT_MODEL = {name: value for name, value in SMALL_MODEL.items() if name != "num_query_groups"} | {"mla": LATENT}


def model(**fields: Any) -> dict[str, Any]:
    """Return the small model with fields changed or added."""
    return SMALL_MODEL | fields


def fp8(recipe: str) -> dict[str, Any]:
    """Return the precision section of a recipe on FP8 units."""
    return {"compute": "bf16", "fp8": {"recipe": recipe, "backend": "torch"}}


BIASED = {"activation": "gelu", "norm": "layernorm", "linear_bias": True}
YARN = {"scaling": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
DYNAMIC = {"scaling": "dynamic", "factor": 4.0, "original_max_position_embeddings": 16}
DOCUMENTS = {"data": {"document_mask": True}}
LORA = {"lora": {"rank": 8}}
SINKS = model(window_size=48, window_pattern=[True, False], attention_sinks=True)
# name: (number format, model, other sections, ranks of the world, rank)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], int, int]] = {
    "bf16": ("bf16", SMALL_MODEL, {}, 1, 0),
    "fp16": ("fp16", SMALL_MODEL, {}, 1, 0),
    "fp32": ("fp32", SMALL_MODEL, {}, 1, 0),
    "gelu": ("bf16", model(activation="gelu"), {}, 1, 0),
    "squared_relu": ("bf16", model(activation="squared_relu"), {}, 1, 0),
    "geglu_tied": ("bf16", model(activation="geglu", tie_embeddings=True), {}, 1, 0),
    "biased_dropout": ("bf16", model(**BIASED, hidden_dropout=0.1, attention_dropout=0.1), {}, 1, 0),
    "qk_norm_yarn": ("bf16", model(qk_norm=True, rope=YARN), {}, 1, 0),
    "dynamic": ("bf16", model(rope=DYNAMIC), {}, 1, 0),
    "latent": ("bf16", LATENT_MODEL, {}, 1, 0),
    "experts": ("bf16", model(moe=MOE), {}, 1, 0),
    "documents": ("bf16", SMALL_MODEL, DOCUMENTS, 1, 0),
    "latent_documents": ("bf16", LATENT_MODEL, DOCUMENTS, 1, 0),
    "dp2": ("bf16", SMALL_MODEL, {}, 2, 1),
    "tp2": ("bf16", SMALL_MODEL, {"parallel": {"tp": 2}}, 2, 1),
    "tp2_sp": ("bf16", SMALL_MODEL, {"parallel": {"tp": 2, "sp": True}}, 2, 1),
    "pp2_first": ("bf16", SMALL_MODEL, {"parallel": {"pp": 2}}, 2, 0),
    "pp2_vpp2_last": ("bf16", model(num_layers=4), {"parallel": {"pp": 2, "vpp": 2}}, 2, 1),
    "ep2": ("bf16", model(moe=MOE), {"parallel": {"ep": 2}}, 2, 1),
    "window_sinks": ("bf16", SINKS, {}, 1, 0),
    "window_sinks_fp32": ("fp32", SINKS, {}, 1, 0),
    "window_sinks_documents": ("bf16", SINKS, DOCUMENTS, 1, 0),
    "window_documents": ("bf16", model(window_size=48), DOCUMENTS, 1, 0),
    "latent_window": ("bf16", LATENT_MODEL | {"window_size": 48}, {}, 1, 0),
    "cp2_ring_window_sinks_tp2_sp": ("bf16", SINKS, DOCUMENTS | {"parallel": {"cp": 2, "tp": 2, "sp": True}}, 4, 3),
    "cp2_ring": ("bf16", SMALL_MODEL, {"parallel": {"cp": 2}}, 2, 1),
    "cp2_ring_fp32": ("fp32", SMALL_MODEL, {"parallel": {"cp": 2}}, 2, 0),
    "cp2_ring_documents": ("bf16", SMALL_MODEL, DOCUMENTS | {"parallel": {"cp": 2}}, 2, 1),
    "cp2_ring_dynamic_documents": ("bf16", model(rope=DYNAMIC), DOCUMENTS | {"parallel": {"cp": 2}}, 2, 1),
    "cp2_ring_latent_documents": ("bf16", LATENT_MODEL, DOCUMENTS | {"parallel": {"cp": 2}}, 2, 1),
    "cp2_ring_wide_heads": ("bf16", model(head_dim=320), {"parallel": {"cp": 2}}, 2, 1),
    "cp2_all_gather": ("bf16", SMALL_MODEL, {"parallel": {"cp": 2, "cp_attention": "all_gather"}}, 2, 1),
    "cp2_ulysses": ("bf16", SMALL_MODEL, {"parallel": {"cp": 2, "cp_attention": "ulysses"}}, 2, 1),
    "cp4_hierarchical": (
        "bf16", SMALL_MODEL, {"parallel": {"cp": 4, "cp_attention": "hierarchical", "cp_inner": 2}}, 4, 3,
    ),
    "cp2_tp2_sp": ("bf16", SMALL_MODEL, {"parallel": {"cp": 2, "tp": 2, "sp": True}}, 4, 3),
    "recompute_core": ("bf16", SMALL_MODEL, {"train": {"recompute": {"granularity": "selective"}}}, 1, 0),
    "recompute": ("bf16", SMALL_MODEL, {"train": {"recompute": {"granularity": "full"}}}, 1, 0),
    "lora": ("bf16", SMALL_MODEL, LORA, 1, 0),
    "lora_recomputed_dropped": (
        "bf16", SMALL_MODEL, {"lora": {"dropout": 0.1}, "train": {"recompute": {"granularity": "full"}}}, 1, 0,
    ),
    "lora_experts": ("bf16", model(moe=MOE), LORA, 1, 0),
    "lora_latent_tp2_sp": ("bf16", LATENT_MODEL, LORA | {"parallel": {"tp": 2, "sp": True}}, 2, 1),
    "lora_dp2": ("bf16", SMALL_MODEL, LORA, 2, 1),
    "lora_fp8": ("bf16", SMALL_MODEL, LORA | {"precision": fp8("tensorwise")}, 1, 0),
    "fp8_tensorwise": ("bf16", SMALL_MODEL, {"precision": fp8("tensorwise")}, 1, 0),
    "fp8_rowwise_tp2_sp": (
        "bf16", SMALL_MODEL, {"parallel": {"tp": 2, "sp": True}, "precision": fp8("rowwise")}, 2, 1,
    ),
    "fp8_delayed_experts": ("bf16", model(moe=MOE), {"precision": fp8("delayed")}, 1, 0),
}  # fmt: skip
LARGE_MODEL = {
    "num_layers": 4, "hidden_size": 2048, "ffn_hidden_size": 5632, "num_attention_heads": 16, "num_query_groups": 4,
    "vocab_size": 32000,
}  # fmt: skip
LARGE_LATENT = {"q_lora_rank": 768, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
TOKENS = {"seq_len": 4096, "global_batch_size": 4, "micro_batch_size": 1}


def large(
    *,
    compute: str = "bf16",
    train: dict[str, Any] | None = None,
    ranks: tuple[int, int] = (1, 0),
    fields: dict[str, Any] | None = None,
    **sections: Any,
) -> tuple[str, dict[str, Any], dict[str, Any], int, int]:
    """Return a case whose activations weigh."""
    return compute, LARGE_MODEL | (fields or {}), {"train": TOKENS | (train or {}), **sections}, *ranks


MEMORY_CASES = {
    "plain": large(),
    "fp32": large(compute="fp32"),
    "gelu": large(fields={"activation": "gelu"}),
    "qk_norm": large(fields={"qk_norm": True}),
    "latent": large(fields={"num_query_groups": None, "mla": LARGE_LATENT | {"v_head_dim": 128}}),
    "window_and_sinks": large(fields={"window_size": 1024, "attention_sinks": True}),
    "two_rows": large(train={"micro_batch_size": 2}),
    "geglu": large(fields={"activation": "geglu", "num_layers": 16}, train={"micro_batch_size": 4}),
    "recompute_long": large(
        fields={"max_position_embeddings": 32768},
        train={"seq_len": 32768, "global_batch_size": 1, "recompute": {"granularity": "full"}},
    ),
    "recompute_mlp": large(train={"recompute": {"granularity": "selective", "modules": ["mlp"]}}),
    "recompute_all": large(train={"recompute": {"granularity": "full"}}),
    "fp8": large(precision=fp8("tensorwise")),
    "lora": large(lora={"rank": 16}),
    "dp2": large(ranks=(2, 0)),
    "tp2_sp": large(ranks=(2, 0), parallel={"tp": 2, "sp": True}),
    "pp2_first": large(ranks=(2, 0), parallel={"pp": 2}),
    "pp2_last": large(ranks=(2, 1), parallel={"pp": 2}),
}
LARGE_AND_WHOLE = {"plain", "tp2_sp"}
"""Large cases that do all that the small ones do: logits that are made in pieces. The others take steps of training."""
NUM_PROCESSES = 2
ONCE_A_STEP = {"sums.from_vector", "cuda.synchronize", "clip_grads.get_grad_norm_fp32"}
"""The loss, to time the phases, and the norm of the gradients: after all work of both passes has been queued."""
FURTHER_READS = {
    # the loss scale, the smallest that there is, and whether it was too large
    "fp16": {"update.update_weights", "optimizer._unscale_main_grads_and_check_for_nan"},
    "experts": {"router_losses.read_router_losses"},
    "lora_experts": {"router_losses.read_router_losses"},
    "ep2": {"router_losses.read_router_losses"},
    "fp8_delayed_experts": {"router_losses.read_router_losses"},
    "tp2": {"update.has_non_finite_duplicate", "collectives.any_rank"},
}
DISPATCHER = "moe_utils.maybe_move_tensor_to_cpu"
"""Megatron-Core's dispatcher of experts needs the sizes of what it sends, once a layer and microbatch."""
PIPELINE = "p2p_communication._communicate"
"""Megatron-Core waits for each batch of sends and receives; interleaved stages send one by one, and do not."""

# Cases that take steps of the other stages too, an evaluation, scores and answers: each kind of model, each axis.
WHOLE = (
    "bf16", "fp16", "fp32", "dynamic", "latent", "experts", "documents", "latent_documents", "dp2", "tp2_sp",
    "pp2_first", "pp2_vpp2_last", "ep2", "window_sinks", "window_documents", "cp2_ring_documents",
    "cp2_ring_latent_documents", "cp2_ulysses", "cp4_hierarchical", "cp2_tp2_sp", "recompute", "lora",
    "lora_experts", "lora_latent_tp2_sp", "fp8_tensorwise", "fp8_rowwise_tp2_sp", "fp8_delayed_experts",
)  # fmt: skip
REWARDED = (
    "bf16", "fp16", "experts", "tp2_sp", "pp2_first", "pp2_vpp2_last", "cp2_ring_documents", "fp8_tensorwise", "lora",
)  # fmt: skip
"""Of these: steps of distillation, of a reward model and of a critic too."""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What became of every case."""
    from configs.errors import BadInput
    from parallel.platform.fake.runtime import build_runtime, fake_environment

    try:
        library = build_runtime(tmp_path_factory.mktemp("fake"))
    except BadInput as error:
        pytest.skip(str(error))
    environment = fake_environment(library, HERE.parents[1])
    cases = {
        name: {
            "config": build_config(compute, shape, **sections).model_dump(mode="json"), "world": world, "rank": rank,
            "is_whole": name in WHOLE or name in LARGE_AND_WHOLE,
            "has_reward": name in REWARDED,
        }
        for name, (compute, shape, sections, world, rank) in (CASES | MEMORY_CASES).items()
    }  # fmt: skip

    def run(some: dict[str, Any]) -> dict[str, Any]:
        command = [sys.executable, str(HERE / "world.py")]
        done = subprocess.run(command, input=json.dumps(some), env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    names = list(cases)
    with ThreadPoolExecutor() as pool:  # a core each
        parts = pool.map(
            run, [{name: cases[name] for name in names[part::NUM_PROCESSES]} for part in range(NUM_PROCESSES)]
        )
        return {name: outcome for part in parts for name, outcome in part.items()}


@pytest.mark.parametrize("name", CASES)
def test_a_step_on_a_fake_gpu(outcomes, name):
    assert outcomes[name]["error"] is None


@pytest.mark.parametrize("name", CASES)
def test_the_host_reads_after_the_backward_pass_alone(outcomes, name):
    """So that it stays ahead of the GPU: nothing within the forward and backward passes waits."""
    reads = outcomes[name]["reads"]
    stages = ("policy", "sft", "preference") if name in WHOLE else ()
    for stage in (*stages, "distill", "reward", "critic") if name in REWARDED else stages:
        assert outcomes[name][f"reads_of_{stage}"].keys() == reads.keys(), stage
    is_waiting = reads.pop(DISPATCHER, 0) > 0
    assert is_waiting == ("experts" in name or name == "ep2")
    assert (reads.pop(PIPELINE, 0) > 0) == (name == "pp2_first")
    assert set(reads) == ONCE_A_STEP | FURTHER_READS.get(name, set())
    assert all(times <= 2 for times in reads.values()), reads


@pytest.mark.parametrize("name", WHOLE)
def test_generation_reads_its_tokens_alone(outcomes, name):
    """Once for each of the three tokens of a row, twice as often where a row has waited."""
    reads = outcomes[name]["reads_of_generation"]
    if name == "ep2" or "experts" in name:
        return
    reads = {place: times for place, times in reads.items() if place not in (DISPATCHER, PIPELINE)}
    assert reads in ({"generator._draw": 3}, {"generator._draw": 6})


@pytest.mark.parametrize("name", MEMORY_CASES)
def test_the_memory_plan_is_what_a_step_takes(outcomes, name):
    from configs.plan.derive import derive_layout
    from configs.plan.estimate import estimate_stages

    compute, shape, sections, world, rank = MEMORY_CASES[name]
    assert outcomes[name]["error"] is None
    config = build_config(compute, shape, **sections)
    estimate = estimate_stages(config, derive_layout(config, world))[rank * config.parallel.pp // world]
    # The plan leaves out temporary buffers, which a stage without logits needs most of, in its backward pass.
    lower = 0.94 if rank * config.parallel.pp // world < config.parallel.pp - 1 else 0.96
    assert lower < estimate.total / outcomes[name]["peak_bytes"] < 1.04
