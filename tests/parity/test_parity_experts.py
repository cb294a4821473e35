"""Mixtures of experts and latent attention: every layout gives one rank's losses, gradient norms and weights."""

from __future__ import annotations

import numpy as np
import pytest

from configs.stages import Config
from tests.pool import Place
from tests.small_runs import build_stage, open_engine, small_config, train_steps

MOE = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 64}
SOFTMAX = {"moe": MOE}
DEEPSEEK = {
    "moe": MOE
    | {
        "num_dense_layers": 1,
        "shared_expert_ffn_hidden_size": 32,
        "score_function": "sigmoid",
        "balancing": "bias",
        "scaling_factor": 2.5,
        "num_groups": 2,
        "group_top_k": 1,
    }
}
NO_BALANCING = {"moe": MOE | {"balancing": "none", "softmax_before_topk": True}}
Z_LOSS = {"moe": MOE | {"z_loss_coeff": 1e-2}}
MLA = {
    "mla": {
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
    },
    "num_query_groups": None,
    "rope": {"interleaved": True},
}
YARN = {"scaling": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "mscale_all_dim": 1.0}
EP2 = (2, {"ep": 2})
EP2_TP2 = (4, {"ep": 2, "tp": 2, "sp": True})
EP2_TP2_ETP1 = (4, {"ep": 2, "tp": 2, "sp": True, "etp": 1})


@pytest.mark.parametrize("layout", [EP2, EP2_TP2, EP2_TP2_ETP1], ids=["ep2", "ep2_tp2", "ep2_tp2_etp1"])
def test_experts_on_ranks_equal_one_rank(judge, layout):
    judge.check(*layout, model=SOFTMAX)


@pytest.mark.parametrize(
    "layout",
    [(2, {}), (2, {"tp": 2, "sp": True}), (2, {"pp": 2}), (4, {"ep": 4}), (4, {"ep": 2, "pp": 2, "vpp": 2})],
    ids=["dp2", "tp2_sp", "pp2", "ep4", "ep2_pp2_vpp2"],
)
def test_experts_on_further_layouts(judge, layout):
    judge.check(*layout, model=SOFTMAX)


@pytest.mark.parametrize("layout", [EP2, EP2_TP2, (4, {"ep": 2, "pp": 2})], ids=["ep2", "ep2_tp2", "ep2_pp2"])
@pytest.mark.parametrize("model", [DEEPSEEK, NO_BALANCING, Z_LOSS], ids=["deepseek", "no_balancing", "z_loss"])
def test_routers_on_ranks_equal_one_rank(judge, model, layout):
    judge.check(*layout, model=model)


@pytest.mark.parametrize("layout", [pytest.param(EP2, id="ep2"), pytest.param((4, {"ep": 4}), id="ep4")])
def test_experts_with_uneven_token_counts(judge, layout):
    judge.check(*layout, masks="uneven", model=NO_BALANCING)


@pytest.mark.parametrize("layout", [EP2, (2, {"tp": 2, "sp": True}), (2, {"pp": 2})], ids=["ep2", "tp2_sp", "pp2"])
def test_router_losses_with_uneven_token_counts(judge, layout):
    judge.check(*layout, masks="uneven", model=Z_LOSS)


@pytest.mark.parametrize("layout", [EP2, EP2_TP2], ids=["ep2", "ep2_tp2"])
def test_experts_with_documents(judge, layout):
    judge.check(*layout, masks="documents", model=SOFTMAX, data={"document_mask": True})


@pytest.mark.parametrize("modules", [["moe"], ["core_attn", "moe"]], ids=["moe", "core_attn_moe"])
def test_recomputed_experts(judge, modules):
    judge.check(*EP2, model=SOFTMAX, train={"recompute": {"granularity": "selective", "modules": modules}})


@pytest.mark.parametrize("layout", [(2, {"tp": 2}), (2, {"tp": 2, "sp": True}), (4, {"tp": 4})], ids=str)
def test_gradients_of_replicated_weights(judge, ranks, layout):
    """One by one: a gradient that is counted twice moves the norm of all hardly, and Adam forgives it."""
    seed, (world, parallel) = str(judge.seed(MLA)), layout
    (expected,) = ranks.run(gradients_from_seed, small_config(model=MLA), seed)
    found = ranks.run(gradients_from_seed, small_config(world, model=MLA, parallel=parallel), seed, world=world)
    assert any("q_layernorm" in name for name in expected)
    for name, gradient in expected.items():
        for rank in found:
            if rank[name].shape == gradient.shape:
                atol = 1e-5 * float(np.abs(gradient).max())
                np.testing.assert_allclose(rank[name], gradient, rtol=0, atol=atol, err_msg=name)


def gradients_from_seed(place: Place, config: Config, run_dir: str) -> dict[str, np.ndarray]:
    """Return every gradient of this rank after one step, by name."""
    from trainer.checkpoint.layout import resolve_checkpoint
    from trainer.checkpoint.load import warm_start
    from trainer.engine.state import TrainState

    with open_engine(place, config) as engine:
        warm_start(engine, resolve_checkpoint(run_dir))
        train_steps(build_stage(engine), TrainState(), 1)
        return {name: one.main_grad.numpy().copy() for name, one in engine.chunks[0].named_parameters()}


def test_latent_attention_with_wide_values(judge):
    """Values wider than queries and keys."""
    judge.check(2, {"tp": 2}, model=MLA | {"mla": MLA["mla"] | {"v_head_dim": 40}})


def test_latent_attention_tp2(judge):
    judge.check(2, {"tp": 2}, model=MLA)


@pytest.mark.parametrize("layout", [(2, {"tp": 2, "sp": True}), (4, {"tp": 2, "pp": 2})], ids=["tp2_sp", "tp2_pp2"])
@pytest.mark.parametrize("masks", ["all", "documents"])
def test_latent_attention_on_layouts(judge, layout, masks):
    judge.check(*layout, masks=masks, model=MLA, data={"document_mask": masks == "documents"})


def test_latent_attention_with_yarn(judge):
    model = MLA | {"rope": MLA["rope"] | YARN}
    judge.check(2, {"tp": 2, "sp": True}, model=model)


def test_latent_attention_without_query_compression(judge):
    model = MLA | {"mla": MLA["mla"] | {"q_lora_rank": None}}
    judge.check(4, {"tp": 2, "sp": True, "pp": 2}, model=model)


def test_latent_attention_recomputed(judge):
    judge.check(2, {"tp": 2}, model=MLA, train={"recompute": {"granularity": "selective"}})


def test_pipeline_stage_without_experts(judge):
    """The first stage's layers are all dense, so its ranks have no optimizer for experts."""
    model = {"moe": MOE | {"num_dense_layers": 2}}
    judge.check(4, {"ep": 2, "pp": 2}, model=model)


def test_latent_attention_and_experts_together(judge):
    judge.check(*EP2_TP2, model=MLA | DEEPSEEK)
