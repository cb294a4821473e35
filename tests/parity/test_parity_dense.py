"""Dense models: every layout, batch split and saving of memory gives one rank's losses, gradient norms and weights."""

from __future__ import annotations

import pytest

TP2 = (2, {"tp": 2})
TP2_SP = (2, {"tp": 2, "sp": True})
PP2 = (2, {"pp": 2})
PP2_VPP2 = (2, {"pp": 2, "vpp": 2})
DP2 = (2, {})
TP2_PP2 = (4, {"tp": 2, "pp": 2})
TP2_DP2 = (4, {"tp": 2})
LAYOUTS = {
    "tp2": TP2,
    "tp2_sp": TP2_SP,
    "pp2": PP2,
    "pp2_vpp2": PP2_VPP2,
    "dp2": DP2,
    "tp2_pp2": TP2_PP2,
    "tp2_dp2": TP2_DP2,
}
MORE_LAYOUTS = {
    "tp4_more_ranks_than_key_heads": (4, {"tp": 4}),
    "tp4_sp": (4, {"tp": 4, "sp": True}),
    "pp4": (4, {"pp": 4}),
    "dp4": (4, {}),
    "tp2_sp_pp2": (4, {"tp": 2, "sp": True, "pp": 2}),
    "tp2_sp_pp2_vpp2": (4, {"tp": 2, "sp": True, "pp": 2, "vpp": 2}),
    "pp2_dp2": (4, {"pp": 2}),
    "pp2_first_1": (2, {"pp": 2, "num_layers_in_first_pp_stage": 1}),
    "pp2_last_1": (2, {"pp": 2, "num_layers_in_last_pp_stage": 1}),
    "pp3_first_1_last_1": (3, {"pp": 3, "num_layers_in_first_pp_stage": 1, "num_layers_in_last_pp_stage": 1}),
}
EIGHT_RANKS = {
    "tp2_pp2_dp2": (8, {"tp": 2, "pp": 2}),
    "tp2_sp_pp2_vpp2_dp2": (8, {"tp": 2, "sp": True, "pp": 2, "vpp": 2}),
}
MODELS = {
    "tied_embeddings": {"tie_embeddings": True},
    "qk_norm": {"qk_norm": True},
    "qkv_bias": {"qkv_bias": True},
    "biases_layernorm_gelu": {"linear_bias": True, "norm": "layernorm", "activation": "gelu"},
    "one_key_head": {"num_query_groups": 1},
    "wide_heads_part_rotated": {"head_dim": 32, "rope": {"fraction": 0.5, "interleaved": True}},
    "squared_relu": {"activation": "squared_relu"},
    "geglu": {"activation": "geglu"},
}
FULL = {"granularity": "full", "num_layers": 1}
RECOMPUTE = {
    "core_attn": {"granularity": "selective"},
    "core_attn_and_mlp": {"granularity": "selective", "modules": ["core_attn", "mlp"]},
    "full_uniform": FULL,
    "full_block": FULL | {"method": "block"},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_rank(judge, name):
    judge.check(*LAYOUTS[name])


@pytest.mark.parametrize("name", MORE_LAYOUTS)
def test_further_layout_equals_one_rank(judge, name):
    judge.check(*MORE_LAYOUTS[name])


@pytest.mark.parametrize("parallel", [{"pp": 2}, {"pp": 2, "vpp": 2}], ids=["pp2", "pp2_vpp2"])
def test_vocabulary_in_place_of_layers(judge, parallel):
    judge.check(2, parallel | {"vocabulary_counts_as_layers": True}, model={"num_layers": 6})


@pytest.mark.parametrize("name", EIGHT_RANKS)
def test_eight_ranks_equal_one_rank(judge, name):
    judge.check(*EIGHT_RANKS[name])


@pytest.mark.parametrize("layout", [TP2_SP, TP2_PP2], ids=["tp2_sp", "tp2_pp2"])
@pytest.mark.parametrize("name", MODELS)
def test_architecture_equals_one_rank(judge, name, layout):
    judge.check(*layout, model=MODELS[name])


def test_tied_embeddings_on_interleaved_stages_with_replicas(judge):
    judge.check(4, {"pp": 2, "vpp": 2}, model=MODELS["tied_embeddings"])


@pytest.mark.parametrize("name", ["dp2", "tp2_pp2"])
def test_uneven_token_counts(judge, name):
    judge.check(*LAYOUTS[name], masks="uneven")


@pytest.mark.parametrize("layout", [TP2_SP, PP2_VPP2, TP2_DP2], ids=["tp2_sp", "pp2_vpp2", "tp2_dp2"])
def test_uneven_token_counts_on_more_layouts(judge, layout):
    judge.check(*layout, masks="uneven")


def test_replica_without_a_counted_token(judge):
    """With dp = 4 the second rank's whole share of the batch is the two samples that count nothing."""
    judge.check(4, {}, masks="uneven")


@pytest.mark.parametrize("name", ["tp2_sp", pytest.param("pp2_vpp2")])
def test_document_masks(judge, name):
    judge.check(*LAYOUTS[name], masks="documents", data={"document_mask": True})


@pytest.mark.parametrize("layout", [TP2, PP2, DP2, TP2_PP2], ids=["tp2", "pp2", "dp2", "tp2_pp2"])
def test_document_masks_on_more_layouts(judge, layout):
    judge.check(*layout, masks="documents", data={"document_mask": True})


@pytest.mark.parametrize("micro_batch_size", [1, 8, pytest.param(4)])
def test_gradient_accumulation(judge, micro_batch_size):
    judge.check(1, {}, masks="uneven", train={"micro_batch_size": micro_batch_size})


def test_gradient_accumulation_with_documents_on_pipeline(judge):
    judge.check(*PP2, masks="documents", data={"document_mask": True}, train={"micro_batch_size": 1})


@pytest.mark.parametrize("name", RECOMPUTE)
def test_recomputation_changes_nothing(judge, name):
    judge.check(1, {}, train={"recompute": RECOMPUTE[name]})


@pytest.mark.parametrize("layout", [TP2_SP, PP2_VPP2], ids=["tp2_sp", "pp2_vpp2"])
@pytest.mark.parametrize("name", RECOMPUTE)
def test_recomputation_changes_nothing_on_layouts(judge, name, layout):
    judge.check(*layout, train={"recompute": RECOMPUTE[name]})


@pytest.mark.parametrize("param_gather", [False, True], ids=["grad_reduce", "grad_reduce_and_param_gather"])
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(DP2, id="dp2"),
        pytest.param((4, {"pp": 2}), id="pp2_dp2"),
        pytest.param((4, {"pp": 2, "vpp": 2}), id="vpp2_dp2"),
    ],
)
def test_overlapped_communication_changes_nothing(judge, layout, param_gather):
    world, parallel = layout
    overlap = {"overlap_grad_reduce": True, "overlap_param_gather": param_gather}
    judge.check(world, parallel | overlap)
